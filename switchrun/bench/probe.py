"""One fill, measured from outside: torch's own hooks around the sparse layers, and the cache's counters."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import reduce
from typing import Any

import torch

from switchrun.bench.raw_disk import io_read_bytes
from switchrun.checkpoint.names import STACKS
from switchrun.checkpoint.types import ExpertKey, Stack
from switchrun.experts.bookkeeping import CacheCounters, since, total
from switchrun.experts.module import OffloadedExperts
from switchrun.experts.reader import Segment
from switchrun.model.engine import Engine, gpu_memory_as_budget
from switchrun.model.generate import generate_batch
from switchrun.model.records import GenerationOptions


@dataclass(slots=True)
class StageTimes:
    """What the encoder step, or all decoder steps together, took; `gpus` counts the cache's levels on GPUs alone."""

    seconds: float
    #: In sparse layers after the router: waiting, and computing experts.
    expert_layer_seconds: float
    counters: CacheCounters
    gpus: CacheCounters


@dataclass(slots=True)
class Measured:
    """One fill; the peaks are those of the process so far."""

    seconds: float
    #: When each token was there, from the start on.
    token_seconds: list[float]
    stages: dict[Stack, StageTimes]
    output_ids: list[list[int]]
    io_read_bytes: int | None
    peak_rss_bytes: int
    peak_gpu_bytes: int | None


class Probe:
    """Watches an engine: which experts its layers ask for, what is read for them, and how long they run.

    A context manager: leaving it takes the hooks off.

    Attributes:
        reads: What the last fill read, in order, by stack.
        use: How many calls of the last fill asked for each expert.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        named = engine.model.named_modules()
        self._layers: dict[Any, tuple[Stack, int]] = {
            module: _place(name) for name, module in named if isinstance(module, OffloadedExperts)
        }
        self._forget()

    def _forget(self) -> None:
        self.reads: dict[Stack, list[Segment]] = {stack: [] for stack in STACKS}
        self.use: Counter[ExpertKey] = Counter()
        self._inside: dict[Stack, float] = dict.fromkeys(STACKS, 0.0)
        self._encoder_end = 0.0
        self._encoder_counters: Mapping[str, CacheCounters] = {}

    def __enter__(self) -> Probe:
        self._hooks = ExitStack()
        for module in self._layers:
            for handle in (module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)):
                self._hooks.callback(handle.remove)
        self._hooks.callback(self._engine.model.encoder.register_forward_hook(self._end_of_encoder).remove)
        self._hooks.callback(setattr, self._engine.cache, "on_load", None)
        self._engine.cache.on_load = self._note_load
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def fill(
        self,
        rows: Sequence[Sequence[int]],
        output_tokens: int,
        on_token: Callable[[int], object] = lambda _done: None,
    ) -> Measured:
        """Generate exactly so many tokens for each row of ids, all rows of one length; blocks until it is done.

        `on_token` is called with their number so far.
        """
        self._forget()
        times: list[float] = []

        def note_token(done: int) -> None:
            times.append(time.perf_counter() - start)
            on_token(done)

        io, before = io_read_bytes(), self._engine.tiers.counters()
        start = time.perf_counter()
        with gpu_memory_as_budget(self._engine.plan):
            ids = torch.tensor(rows, device=self._engine.device)
            outputs = generate_batch(
                self._engine.model,
                self._engine.context,
                ids,
                torch.ones_like(ids),
                GenerationOptions(max_new_tokens=output_tokens),
                on_token=note_token,
                min_new_tokens=output_tokens,
            )
        end = time.perf_counter()
        after, io_after = self._engine.tiers.counters(), io_read_bytes()
        middle = self._encoder_counters
        return Measured(
            seconds=end - start,
            token_seconds=times,
            stages={
                "encoder": _stage_times(self._encoder_end - start, self._inside["encoder"], since(middle, before)),
                "decoder": _stage_times(end - self._encoder_end, self._inside["decoder"], since(after, middle)),
            },
            output_ids=[list(output.ids) for output in outputs],
            io_read_bytes=None if io is None or io_after is None else io_after - io,
            **asdict(self._engine.memory_peak()),
        )

    def _enter(self, module: Any, args: tuple[torch.Tensor, ...]) -> None:
        chosen = args[1].nonzero()[:, -1]  # [tokens, 1, num_experts], all zero for a dropped token
        self.use.update(ExpertKey(*self._layers[module], expert) for expert in set(chosen.tolist()))
        self._entered = time.perf_counter()

    def _leave(self, module: Any, *_: Any) -> None:
        self._inside[self._layers[module][0]] += time.perf_counter() - self._entered

    def _end_of_encoder(self, *_: Any) -> None:
        self._encoder_end = time.perf_counter()
        self._encoder_counters = self._engine.tiers.counters()

    def _note_load(self, key: ExpertKey, segments: tuple[Segment, ...]) -> None:
        self.reads[key.stack] += segments


def _stage_times(seconds: float, inside: float, tiers: Mapping[str, CacheCounters]) -> StageTimes:
    gpus = [counters for tier, counters in tiers.items() if tier != "cpu"]
    return StageTimes(seconds, inside, total(tiers), reduce(CacheCounters.plus, gpus, CacheCounters()))


def used_experts(use: Mapping[ExpertKey, int]) -> dict[str, dict[str, int]]:
    """Return the counts by layer (`encoder.3`) and expert, in order, as JSON has them."""
    result: dict[str, dict[str, int]] = {}
    for key in sorted(use, key=lambda key: (STACKS.index(key.stack), key.block, key.expert)):
        result.setdefault(f"{key.stack}.{key.block}", {})[str(key.expert)] = use[key]
    return result


def _place(name: str) -> tuple[Stack, int]:
    """Return the stack and block of a module like `encoder.block.3.layer.1.mlp.experts`."""
    stack, _, block, *_ = name.split(".")
    return "encoder" if stack == "encoder" else "decoder", int(block)
