r"""Whether a fill stays within `--cpu-memory`: random models, dtypes, budgets and batches, in processes of their own.

    python benchmarks/memory_promise.py --cases 60 --seed 0

Each case is run by the command line and by the Python API. Prints the peak resident set of the process as a share of
the budget, and what of the budget was left where it was the minimum. Models are sparse files: dense weights are random
numbers, experts are holes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from memory_group import MemoryGroup

from switchrun.bench.synthetic import Geometry
from switchrun.checkpoint.names import STACKS, dense_tensors, mlp_prefix
from switchrun.planning import Plan
from switchrun.planning.opening import plan
from switchrun.units import MIB

WAYS = ("cli", "api")
DTYPES = ("auto", "fp32", "bf16", "int8", "nf4")
STORED = {"BF16": 2, "F16": 2, "F32": 4}
#: What a case may take of a processor: tokens times weights, summed over the layers.
_MOST_PRODUCTS = 3e11
#: Bytes of dense weights on disk: enough to be most of a budget.
_MOST_DENSE_BYTES = 600 * MIB

#: Runs a command and reports its peak resident set: this small process is all that it was forked from.
_MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024, file=sys.stderr)
sys.exit(code if code >= 0 else 128 - code)
"""
#: The same fill by the Python API.
_API = """
import json, sys
from switchrun import GenerationOptions, Session
case = json.loads(sys.argv[1])
with Session.open(**case["open"]) as session:
    session.fill(sys.stdin.read().splitlines(), GenerationOptions(**case["generation"]))
"""


@dataclass(frozen=True, slots=True)
class Case:
    """A model and a batch: the longest of its `rows` texts has `tokens` tokens.

    The budget lies so far from the model's minimum (0) to all of it in memory (1).
    """

    geometry: Geometry
    stored: str
    dtype: str
    room: float
    rows: int
    tokens: int
    new_tokens: int
    beams: int
    threads: int

    def plan(self, model: Path, cpu_memory: int) -> Plan:
        """Return the plan for a budget."""
        return plan(
            model,
            dtype=self.dtype,
            cpu_memory=cpu_memory,
            gpu_memory=0,
            batch_size=self.rows,
            num_beams=self.beams,
            output_tokens=self.new_tokens,
        )

    def budget(self, model: Path) -> int:
        """Return the budget."""
        most = self.plan(model, 1 << 50)
        return round(most.minimum_cpu_bytes + self.room * (most.resident_cpu_bytes - most.minimum_cpu_bytes))

    def texts(self) -> list[str]:
        """Return the texts: the first has the most tokens, the last two thirds of them."""
        lengths = [max(4, round(self.tokens * (1 - row / (3 * self.rows)))) for row in range(self.rows)]
        chosen = random.Random(0)
        return [
            "<extra_id_0> " + " ".join(f"w{chosen.randrange(1000)}" for _ in range(length - 2)) for length in lengths
        ]

    @property
    def products(self) -> float:
        """Multiplications of the whole fill."""
        g = self.geometry
        inner = g.num_heads * g.d_kv
        block = 6 * inner * g.d_model + 2 * g.d_model * g.d_ff
        encoder = self.rows * self.tokens * (block + 2 * self.tokens * inner)
        steps = self.rows * self.beams * self.new_tokens
        # In a step, what counts is reading the weights.
        decoder = steps * (block + 2 * self.tokens * inner) + 8 * self.new_tokens * block
        head = (steps + 8 * self.new_tokens) * g.d_model * g.vocab_size
        return g.num_layers * (encoder + decoder) + head


def draw_cases(seed: int) -> Iterator[Case]:
    """Yield random cases, without end."""
    draw = random.Random(seed)
    while True:
        d_model = draw.choice((128, 256, 512, 512, 768, 1024, 1024, 2080))
        geometry = Geometry(
            d_model=d_model,
            d_ff=d_model * draw.choice((2, 3, 4)),
            d_kv=64,
            num_heads=max(2, d_model // 64),
            num_layers=draw.choice((2, 2, 4, 6)),
            num_experts=draw.choice((2, 4, 8, 64)),
            sparse_step=draw.choice((1, 2)),
            tied=draw.random() < 0.5,
            vocab_size=draw.choice((8192, 32128, 32128, 65536)),
        )
        case = Case(
            geometry,
            stored=draw.choice(tuple(STORED)),
            dtype=draw.choice(DTYPES),
            room=draw.choice((0, 0, 0.05, draw.random() ** 2, 1)),
            rows=draw.choice((1, 1, 2, 4, 8, 16, 32)),
            tokens=draw.choice((8, 24, 100, 200, 350, 512, 512)),
            new_tokens=draw.choice((1, 2, 4, 8, 30, 200)),
            beams=draw.choice((1, 1, 1, 2, 4)),
            threads=draw.choice((1, 2, 4)),
        )
        dense = STORED[case.stored] * sum(math.prod(shape) for _, shape in _dense(geometry))
        if case.products < _MOST_PRODUCTS and dense < _MOST_DENSE_BYTES:
            yield case


def make_model(folder: Path, geometry: Geometry, stored: str) -> Path:
    """Write a checkpoint with a tokenizer that has a word for each of its ids, as large as T5's."""
    import torch

    shapes = dict(_dense(geometry))
    sparse = [block for block in range(geometry.num_layers) if geometry.sparse(block)]
    for stack, block, expert in product(STACKS, sparse, range(geometry.num_experts)):
        prefix = f"{mlp_prefix(stack, block)}.experts.expert_{expert}"
        shapes[f"{prefix}.wi.weight"] = (geometry.d_ff, geometry.d_model)
        shapes[f"{prefix}.wo.weight"] = (geometry.d_model, geometry.d_ff)
    header: dict[str, Any] = {}
    cursor = 0
    for name, shape in shapes.items():
        end = cursor + STORED[stored] * math.prod(shape)
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [cursor, end]}
        cursor = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    normal = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for name, _ in _dense(geometry):
            scale = 1.0 if "norm" in name or "shared" in name else geometry.d_model**-0.5
            values = torch.ones(1 << 20) if "norm" in name else normal * scale
            pool = values.to(getattr(torch, names[stored])).view(torch.uint8).numpy().tobytes()
            begin, end = header[name]["data_offsets"]
            file.seek(start + begin)
            for done in range(begin, end, len(pool)):
                file.write(pool[: end - done])
        file.truncate(start + cursor)
    config = geometry.config() | {"dtype": names[stored], "pad_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps(config))
    _make_tokenizer(folder, geometry.vocab_size)
    return folder


def _dense(geometry: Geometry) -> Iterator[tuple[str, tuple[int, ...]]]:
    sparse = [block for block in range(geometry.num_layers) if geometry.sparse(block)]
    return dense_tensors(geometry.config(), dict.fromkeys(STACKS, sparse), geometry.tied)


def _make_tokenizer(folder: Path, vocab_size: int) -> None:
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(100))]
    words = [f"\u2581w{number}" for number in range(vocab_size - 3 - len(sentinels))]
    special = ["<pad>", "</s>", "<unk>", *sentinels]
    vocab = [*((each, 0.0) for each in special[:3]), *((word, -9.0) for word in words)]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": number if number < 3 else vocab_size - len(sentinels) + number - 3, "content": content}
            | {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            for number, content in enumerate(special)
        ],
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "model": {"type": "Unigram", "unk_id": 2, "vocab": [*vocab, *((each, 0.0) for each in sentinels)]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "<unk>"}))


def peak_of(
    case: Case, model: Path, way: str, budget: int | None, env: Mapping[str, str], group: MemoryGroup | None = None
) -> int:
    """Fill in a process of its own, in a control group if there is one, and return the peak of its resident set.

    Without a budget it has the default one.

    Raises:
        RuntimeError: It did not end well.
    """
    if way == "cli":
        command = [sys.executable, "-m", "switchrun", "fill", "--model", str(model), "--dtype", case.dtype]
        command += ["--batch-size", str(case.rows), "--num-beams", str(case.beams), "--gpu-memory", "0"]
        command += ["--max-new-tokens", str(case.new_tokens), "--offload-folder", str(model / "offload" / way)]
        command += [] if budget is None else ["--cpu-memory", str(budget)]
    else:
        options = {"model": str(model), "dtype": case.dtype, "cpu_memory": budget, "gpu_memory": 0}
        options |= {"batch_size": case.rows, "num_beams": case.beams, "max_new_tokens": case.new_tokens}
        generation = {"num_beams": case.beams, "max_new_tokens": case.new_tokens}
        options["offload_folder"] = str(model / "offload" / way)
        command = [sys.executable, "-c", _API, json.dumps({"open": options, "generation": generation})]
    enter: Callable[[], None] | None = None if group is None else lambda: group.add(os.getpid())
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command],
        input="\n".join(case.texts()),
        env={**env, "OMP_NUM_THREADS": str(case.threads)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        preexec_fn=enter,
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-2000:]}")
    return int(done.stderr.splitlines()[-1])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minimum", action="store_true", help="only budgets that are the minimum")
    parser.add_argument("--out", type=Path, help="a file for the results, a line of JSON each")
    options = parser.parse_args()
    shares: list[float] = []
    unused: list[float] = []
    cases = draw_cases(options.seed)
    for number in range(options.cases):
        case = next(cases)
        if options.minimum:
            case = replace(case, room=0.0)
        with tempfile.TemporaryDirectory(prefix="switchrun-") as folder:
            model = make_model(Path(folder) / "model", case.geometry, case.stored)
            budget = case.budget(model)
            planned = case.plan(model, budget)
            for way in WAYS:
                try:
                    peak = peak_of(case, model, way, budget, os.environ)
                except RuntimeError as error:
                    print(f"{number:3} {way} FAILED {case}\n{error}", flush=True)
                    continue
                share = peak / budget
                shares.append(share)
                if not case.room:
                    unused.append(1 - share)
                use = planned.tier("cpu")
                g = case.geometry
                print(
                    f"{number:3} {way} {share:.3f} peak {peak / MIB:6.0f} budget {budget / MIB:6.0f} MiB "
                    f"(overhead {use.overhead_bytes // MIB} activations {use.activation_bytes // MIB} dense "
                    f"{use.dense_bytes // MIB} experts {use.expert_bytes // MIB}) d{g.d_model} ff{g.d_ff} "
                    f"L{g.num_layers} E{g.num_experts} V{g.vocab_size} {case.stored}->{case.dtype} "
                    f"{case.rows}x{case.tokens}+{case.new_tokens} b{case.beams} t{case.threads} room {case.room:.2f}",
                    flush=True,
                )
                if options.out:
                    with open(options.out, "a") as file:
                        record = {"case": asdict(case), "way": way, "peak": peak, "budget": budget}
                        record |= {"overhead": use.overhead_bytes, "activations": use.activation_bytes}
                        record |= {"dense": use.dense_bytes, "experts": use.expert_bytes}
                        file.write(json.dumps(record) + "\n")
    print(
        f"{len(shares)} runs: peak ÷ budget median {statistics.median(shares):.3f}, max {max(shares):.3f}, "
        f"over 1: {sum(share > 1 for share in shares)}"
    )
    if unused:
        print(f"unused at the minimum: median {statistics.median(unused):.1%}, least {min(unused):.1%}")


if __name__ == "__main__":
    main()
