r"""switchrun in turn with plain transformers and accelerate, or with another checkout of itself, on one checkpoint.

    python benchmarks/against_accelerate.py --synthetic switch-c-2048:experts=16 --materialize 26GB --dtype bf16 \
        --memory-limit 8GiB --cpu-memory 4GiB --input-tokens 24 --output-tokens 12 --warmup 1 --repeats 3

Each fill runs in a process of its own, the checkpoint out of the page cache, and with `--memory-limit` in a control
group that counts the page cache too; making one takes root, or a writable /sys/fs/cgroup. `--against` names who takes
turns with this checkout: `accelerate`, folders of other checkouts, or both. Prints medians, samples and ratios, and
whether all generated the same tokens.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate_child import complete_checkpoint
from memory_group import MemoryGroup

from switchrun.bench.child_process import CHILD, Answer, ChildError, Task, run_child
from switchrun.bench.raw_disk import drop_page_cache
from switchrun.bench.records import fill_metrics
from switchrun.bench.runner import Cell, describe_environment, model_files
from switchrun.bench.synthetic import make_synthetic
from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.dtypes import resolve_dtype
from switchrun.machine import folders
from switchrun.units import MIB, parse_bytes

HERE = Path(__file__).resolve().parent
OURS = "switchrun"
ACCELERATE = "accelerate"


def main() -> None:
    """Measure and print."""
    options = parse_options()
    offload = folders.offload_folder(options.offload_folder).resolve()
    model = options.model
    if options.synthetic:
        model = make_synthetic(options.synthetic, options.materialize, offload, note).path
    checkpoint = open_checkpoint(str(model.resolve()), cache_dir=offload / "index")
    cell = Cell(
        str(checkpoint.path),
        dtype=options.dtype,
        cpu_memory_bytes=parse_bytes(options.cpu_memory),
        input_tokens=options.input_tokens,
        output_tokens=options.output_tokens,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    # `cold` and `turn` are for older checkouts.
    task = asdict(cell) | {"offload_folder": str(offload), "work": "measure", "fills": 1, "cold": False, "turn": 0}
    limit = None if options.memory_limit is None else parse_bytes(options.memory_limit)
    offload.mkdir(parents=True, exist_ok=True)
    waiting = [OURS, *options.against]
    answers: dict[str, list[Answer]] = {name: [] for name in waiting}
    for turn in range(options.warmup + options.repeats):
        for name in list(waiting):
            note(f"{name}, fill {turn + 1} of {options.warmup + options.repeats}")
            drop_page_cache(model_files(checkpoint, offload, options.dtype))
            try:
                answer = measure(name, task, checkpoint, limit, options.timeout)
            except ChildError as error:
                note(f"{name}: {error}")
                waiting.remove(name)
                continue
            if turn >= options.warmup:
                answers[name].append(answer)
    environment = describe_environment(checkpoint.path)
    print(", ".join(f"{key} {value}" for key, value in environment.items() if key != "available_memory_bytes"))
    print_answers({name: found for name, found in answers.items() if found}, task)


def parse_options() -> Any:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, help="a folder with a checkpoint")
    model.add_argument("--synthetic", metavar="NAME[:experts=N]", help="make one, as switchrun bench does")
    parser.add_argument("--materialize", metavar="SIZE", help="with --synthetic: so many bytes of experts are real")
    parser.add_argument("--offload-folder", type=Path, help="where switchrun and accelerate may write")
    parser.add_argument("--against", nargs="+", default=[ACCELERATE], metavar="accelerate|FOLDER")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cpu-memory", required=True, metavar="SIZE")
    parser.add_argument("--memory-limit", metavar="SIZE", help="memory of each process, page cache included")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for each process")
    for name, default in (
        ("input-tokens", 24), ("output-tokens", 12), ("batch-size", 1), ("warmup", 0), ("repeats", 3), ("seed", 0)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args()


def measure(name: str, task: Task, checkpoint: SwitchCheckpoint, limit: int | None, timeout: float) -> Answer:
    """Open and fill once, in a process of its own.

    Raises:
        ChildError: It failed, or took too long.
    """
    with ExitStack() as stack:
        if name == ACCELERATE:
            if checkpoint.repairs or checkpoint.stored_dtype == "I8":
                raise ChildError("plain transformers cannot load this checkpoint as it is")
            scratch = Path(tempfile.mkdtemp(prefix="accelerate-", dir=task["offload_folder"]))
            # Else the disk would still be busy with it while the next process is measured.
            stack.callback(os.sync)
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            compute = resolve_dtype(task["dtype"], checkpoint.stored_dtype).compute
            path = complete_checkpoint(checkpoint, scratch)
            task = task | {"model": str(path), "torch_dtype": compute.torch_name, "scratch": str(scratch)}
            module, folder = "accelerate_child", HERE
        else:
            folder = HERE.parent if name == OURS else Path(name).resolve()
            older = "switchrun.bench.cell"  # what checkouts had before they had our CHILD
            module = older if (folder / "switchrun/bench/cell.py").exists() else CHILD
        on_start = (lambda _pid: None) if limit is None else stack.enter_context(MemoryGroup(limit)).add
        return run_child(module, task, timeout=timeout, folder=folder, on_start=on_start)


def figures(answer: Answer, task: Task) -> dict[str, float | None]:
    """Return what is compared, by name."""
    (fill,) = answer["fills"]
    found = {
        "open, s": answer["open_seconds"],
        "fill, s": fill["seconds"],
        "open + fill, s": answer["open_seconds"] + fill["seconds"],
        "read while opening, MiB": (answer["open_io_read_bytes"] or 0) / MIB,
        "peak RSS, MiB": fill["peak_rss_bytes"] / MIB,
    }
    if "stages" in fill:
        metrics = fill_metrics(fill, task, answer["plan"])
        decoder = fill["stages"]["decoder"]["counters"]
        raw = metrics["decoder_raw_bytes_per_second"]
        found["encoder step: achieved ÷ raw disk"] = metrics["encoder_ratio"]
        found["decoder steps: achieved ÷ raw disk"] = metrics["decoder_ratio"]
        if raw and decoder["load_seconds"]:
            # A step cannot know its next expert before its router has spoken: only this part could be faster.
            found["… while an expert is missing"] = decoder["load_bytes"] / decoder["load_seconds"] / raw
    return found


def print_answers(answers: dict[str, list[Answer]], task: Task) -> None:
    """Print the table, and whether the tokens are the same."""
    rows = {name: [figures(answer, task) for answer in found] for name, found in answers.items()}
    print(f"\n{'':36}{'median':>10}{f'÷ {OURS}':>13}  samples")
    for key in dict.fromkeys(key for found in rows.values() for row in found for key in row):
        print(key)
        base = None
        for name, found in rows.items():
            samples = [value for row in found if (value := row.get(key)) is not None]
            if not samples:
                continue
            median = statistics.median(samples)
            base = median if name == OURS else base
            ratio = f"{median / base:.2f}" if base and name != OURS else ""
            print(f"    {name[-31:]:32}{median:10.2f}{ratio:>13}  {' '.join(f'{value:.2f}' for value in samples)}")
    outputs = [answer["fills"][0]["output_ids"] for found in answers.values() for answer in found]
    print(f"same tokens: {'yes' if all(each == outputs[0] for each in outputs) else 'no'}")


def note(line: str) -> None:
    """Write a line for a human."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
