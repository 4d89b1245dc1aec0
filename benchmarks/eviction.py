"""Compare eviction policies on traces: which experts each layer asked for, visit after visit.

    python benchmarks/eviction.py [--work FOLDER] [--sentences 2800] [--only demo]

Traces come from the demo model, filling held-out sentences (tools/demo_corpus.py fetches the text, as packages), and
from made-up geometries with independent requests. Prints a Markdown table of hit rates, and how well a layer's experts
can be foretold by its router applied early. Results: benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from policies import Belady, Cycle, Lfu, Lru, Policy, Random, S3Fifo, Visit, WTinyLfu
from simulation import SEED, STACKS, simulate, synthetic
from torch.nn.functional import linear

from switchrun import GenerationOptions, Session
from switchrun.checkpoint.types import ExpertKey, Stack
from switchrun.experts.policy import NextUsePolicy

ROOT = Path(__file__).resolve().parent.parent

#: The policies by name, the bound last.
POLICIES: dict[str, Callable[[Sequence[Visit], int], Policy]] = {
    "LRU": lambda _, __: Lru(),
    "random": lambda _, __: Random(),
    "LFU, ageing": lambda _, slots: Lfu(slots),
    "S3-FIFO": lambda _, slots: S3Fifo(slots),
    "W-TinyLFU": lambda _, slots: WTinyLfu(slots),
    "cycle": lambda trace, _: Cycle(trace),
    "next use": lambda _, __: NextUsePolicy(),
    "Belady": lambda trace, _: Belady(trace),
}


@dataclass(frozen=True)
class Workload:
    """A trace, and the cache sizes to try: slots, or shares of the experts used."""

    name: str
    trace: list[Visit]
    sizes: tuple[float, ...]


@dataclass(frozen=True)
class Recording:
    """What the demo model asked for, and what its routers, applied one sparse layer early, had foretold.

    Attributes:
        trace: The experts of each visit.
        foretold: The same as foretold; empty for a stack's first sparse layer.
        tokens: Tokens routed, and how many of them as foretold, for each stack.
    """

    trace: list[Visit]
    foretold: list[Visit]
    tokens: dict[Stack, tuple[int, int]]


def held_out_sentences(work: Path) -> list[str]:
    """Held-out sentences of the demo model's corpus, one word in ten (and at least one) replaced by sentinels."""
    sys.path.insert(0, str(ROOT / "tools"))
    from demo_corpus import build

    rng = random.Random(SEED)
    texts = build(ROOT, work).held_out
    rng.shuffle(texts)
    blanked = []
    for text in texts:
        words = text.split()
        places = sorted(rng.sample(range(len(words)), 1 + len(words) // 10))
        for number, place in enumerate(places):
            words[place] = f"<extra_id_{number}>"
        blanked.append(" ".join(words))
    return blanked


def record(texts: Sequence[str], batch_size: int) -> Recording:
    """Fill texts with the demo model and note what its layers ask the cache for."""
    recording = Recording([], [], dict.fromkeys(STACKS, (0, 0)))
    with Session.open(batch_size=batch_size) as session:
        early = _EarlyRouters(session.engine.model, recording)
        stream = session.engine.cache.stream

        def recorded(keys: Sequence[ExpertKey]) -> Iterator[Any]:
            if keys:
                recording.trace.append(tuple(keys))
                foretold = early.experts.pop((keys[0].stack, keys[0].block), ())
                recording.foretold.append(tuple(ExpertKey(keys[0].stack, keys[0].block, expert) for expert in foretold))
            return stream(keys)

        setattr(session.engine.cache, "stream", recorded)  # noqa: B010 (mypy allows no assignment to a method)
        for start in range(0, len(texts), batch_size):
            session.fill(texts[start : start + batch_size], GenerationOptions(max_new_tokens=32))
    return recording


class _EarlyRouters:
    """Applies each sparse layer's norm and router to what leaves the sparse block before it. Hooks stay in place."""

    def __init__(self, model: Any, recording: Recording) -> None:
        self.experts: dict[tuple[Stack, int], tuple[int, ...]] = {}
        self._tokens: dict[tuple[Stack, int], torch.Tensor] = {}
        self._recording = recording
        for stack in STACKS:
            blocks = getattr(model, stack).block
            sparse = [n for n, block in enumerate(blocks) if block.layer[-1].is_sparse]
            for here, following in itertools.pairwise(sparse):
                feed_forward = blocks[following].layer[-1]
                blocks[here].layer[-1].register_forward_hook(self._foretell(stack, following, feed_forward))
                feed_forward.mlp.router.register_forward_hook(self._compare(stack, following))

    def _foretell(self, stack: Stack, block: int, feed_forward: Any) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, hidden: torch.Tensor) -> None:
            normed = feed_forward.layer_norm(hidden).float()
            tokens = linear(normed, feed_forward.mlp.router.classifier.weight).argmax(dim=-1).flatten()
            self._tokens[stack, block] = tokens
            self.experts[stack, block] = tuple(sorted(set(tokens.tolist())))

        return hook

    def _compare(self, stack: Stack, block: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
            actual = outputs[2].argmax(dim=-1).flatten()
            routed, right = self._recording.tokens[stack]
            right += int((actual == self._tokens[stack, block]).sum())
            self._recording.tokens[stack] = routed + len(actual), right

        return hook


def workloads(sentences: Sequence[str], only: str | None) -> Iterator[Workload]:
    """Give everything that the table compares, made when its turn comes."""
    demo = (4, 8, 12, 16, 20, 24, 28)
    if only != "synthetic":
        few = sentences[:1000]
        yield Workload(f"demo model, batch 1, {len(few):,} sentences", record(few, 1).trace, demo)
        yield Workload(f"demo model, batch 8, {len(sentences):,} sentences", record(sentences, 8).trace, demo)
    if only != "demo":
        small, large = (40, 80, 0.25, 0.5, 0.75), (80, 600, 0.1, 0.25, 0.5)
        yield Workload("15+15 × 16, uniform", synthetic(16, 100, 0), small)
        yield Workload("15+15 × 16, uniform, batch 8", synthetic(16, 100, 0, batch=8), small)
        yield Workload("15+15 × 16, Zipf 0.7", synthetic(16, 100, 0.7), small)
        yield Workload("15+15 × 2048, uniform", synthetic(2048, 200, 0), large)
        yield Workload("15+15 × 2048, Zipf 0.7", synthetic(2048, 200, 0.7), large)
        yield Workload("15+15 × 2048, Zipf 1", synthetic(2048, 200, 1), large)
        changing = synthetic(2048, 200, 1, change_every=50)
        yield Workload("15+15 × 2048, Zipf 1, others popular every 50 requests", changing, large[:-1])


def compare(workload: Workload) -> None:
    """Print the hit rates of one workload, a line for each cache size."""
    used = len({key for visit in workload.trace for key in visit})
    for size in workload.sizes:
        slots = int(size * used) if size < 1 else int(size)
        rates = [simulate(make(workload.trace, slots), workload.trace, slots) for make in POLICIES.values()]
        cells = [workload.name, f"{used:,}", f"{slots:,} ({slots / used:.0%})", *(f"{100 * r:.1f}" for r in rates)]
        print("| " + " | ".join(cells) + " |", flush=True)


def first_fills(requests: int = 50) -> None:
    """Print the mean loads of a process's first fill, for the policies that know no more than the past."""
    names = [name for name in POLICIES if name not in ("cycle", "Belady")]
    print("\n| first fill | slots | " + " | ".join(names) + " |\n| --- | --: |" + " --: |" * len(names))
    trace = synthetic(16, requests, 0)
    visits = len(trace) // requests
    each = [trace[start : start + visits] for start in range(0, len(trace), visits)]
    for slots in (15, 31, 80, 120, 240):
        loads = []
        for name in names:
            misses = [(1 - simulate(POLICIES[name](fill, slots), fill, slots)) * sum(map(len, fill)) for fill in each]
            loads.append(f"{sum(misses) / requests:.0f}")
        print(f"| 15+15 × 16, uniform | {slots} | " + " | ".join(loads) + " |", flush=True)


def lookahead(sentences: Sequence[str], slots: int) -> None:
    """Print how well the experts of a stack's next sparse layer can be foretold, one sentence at a time."""
    recording = record(sentences, 1)
    for stack in STACKS:
        routed, right = recording.tokens[stack]
        needed = foretold = both = absent = absent_foretold = wasted = 0

        def watch(number: int, resident: set[ExpertKey], stack: Stack = stack) -> None:
            nonlocal needed, foretold, both, absent, absent_foretold, wasted
            real, guess = set(recording.trace[number]), set(recording.foretold[number])
            if guess and next(iter(guess)).stack == stack:
                needed, foretold, both = needed + len(real), foretold + len(guess), both + len(real & guess)
                absent += len(real - resident)
                absent_foretold += len((real - resident) & guess)
                wasted += len(guess - resident - real)

        simulate(NextUsePolicy(), recording.trace, slots, watch)
        print(
            f"| {stack} | {right / routed:.1%} of {routed:,} | {both / needed:.1%} | {both / foretold:.1%} | "
            f"{absent_foretold / absent:.1%} of {absent:,} | {wasted / max(1, wasted + absent_foretold):.1%} |"
        )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "switchrun-corpus")
    parser.add_argument("--sentences", type=int, default=2800)
    parser.add_argument("--only", choices=["demo", "synthetic"], help="leave out the made-up geometries, or the model")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    sentences = [] if arguments.only == "synthetic" else held_out_sentences(arguments.work)[: arguments.sentences]
    print("| trace | experts used | slots | " + " | ".join(POLICIES) + " |")
    print("| --- | --: | --: |" + " --: |" * len(POLICIES))
    for workload in workloads(sentences, arguments.only):
        compare(workload)
    first_fills()
    if arguments.only == "synthetic":
        return
    print("\n| stack | tokens | recall | precision | missing foretold | wasted reads |")
    print("| --- | --: | --: | --: | --: | --: |")
    lookahead(sentences[:1000], 16)


if __name__ == "__main__":
    main()
