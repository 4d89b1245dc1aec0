"""One fill, measured from outside: torch's own hooks around the sparse layers, and the cache's counters."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from switchrun.bench.process import io_read_bytes
from switchrun.bench.replay import Range
from switchrun.checkpoint.names import STACKS
from switchrun.checkpoint.types import ExpertKey, Stack
from switchrun.experts.bookkeeping import CacheCounters, since, total
from switchrun.experts.cache import ExpertCache
from switchrun.experts.module import OffloadedExperts
from switchrun.experts.reader import Segment
from switchrun.experts.tiers import ExpertTiers, GpuCache
from switchrun.kernels.matrices import ExpertWeights
from switchrun.model.engine import Engine, gpu_memory_as_budget
from switchrun.model.generate import generate_batch
from switchrun.model.records import GenerationOptions


@dataclass(slots=True)
class StageTimes:
    """What the encoder step, or all decoder steps together, took.

    Attributes:
        seconds: From its start to its end.
        expert_layer_seconds: Of that, spent in sparse layers after the router: waiting, and computing experts.
        counters: What the expert cache did meanwhile, all its levels together.
        gpus: What those on GPUs did.
    """

    seconds: float = 0.0
    expert_layer_seconds: float = 0.0
    counters: CacheCounters = field(default_factory=CacheCounters)
    gpus: CacheCounters = field(default_factory=CacheCounters)


@dataclass(slots=True)
class Measured:
    """One fill.

    Attributes:
        seconds: All of it.
        token_seconds: When each token was there, from the start on.
        stages: The encoder step and the decoder steps.
        output_ids: What was generated, for each row.
        io_read_bytes: What the process read from disks meanwhile, by the system's count.
        peak_rss_bytes: The process's peak so far.
        peak_gpu_bytes: The same of GPU memory; None without a GPU.
    """

    seconds: float
    token_seconds: list[float]
    stages: dict[Stack, StageTimes]
    output_ids: list[list[int]]
    io_read_bytes: int | None
    peak_rss_bytes: int
    peak_gpu_bytes: int | None

    def as_record(self) -> dict[str, Any]:
        """Give it as plain values for JSON."""
        return asdict(self)


class Probe:
    """Watches an engine: which experts its layers ask for, what is read for them, and for how long they run.

    A context manager: leaving it takes the hooks off.

    Attributes:
        reads: For each stack, the reads since the last `start`, in order.
        use: How many calls asked for each expert.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        named = engine.model.named_modules()
        self._layers: dict[Any, list[str]] = {
            module: name.split(".") for name, module in named if isinstance(module, OffloadedExperts)
        }
        self._forced: Iterator[torch.Tensor] | None = None
        self.start()

    def start(self) -> None:
        """Forget what was seen so far."""
        self.reads: dict[Stack, list[Range]] = {stack: [] for stack in STACKS}
        self._routes: list[tuple[list[ExpertKey], torch.Tensor]] = []
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
        self._engine.cache.on_load = self._note_load
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.cache.on_load = None
        self._hooks.close()

    def fill(self, rows: Sequence[Sequence[int]], output_tokens: int) -> Measured:
        """Generate exactly so many tokens for each row of ids, all rows of one length; blocks until it is done."""
        self.start()
        options = GenerationOptions(max_new_tokens=output_tokens)
        times: list[float] = []
        io, before = io_read_bytes(), self._engine.tiers.counters()
        start = time.perf_counter()
        with gpu_memory_as_budget(self._engine.plan):
            ids = torch.tensor(rows, device=self._engine.device)
            outputs = generate_batch(
                self._engine.model,
                self._engine.context,
                ids,
                torch.ones_like(ids),
                options,
                on_token=lambda _: times.append(time.perf_counter() - start),
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

    def compute_only(self, rows: Sequence[Sequence[int]], output_tokens: int) -> Measured:
        """Measure the last fill's steps without any read: the same tokens go to experts of the same shapes.

        The experts that are in memory stand in for all others, and the routing is that of the last fill. What is
        generated means nothing.
        """
        levels = self._engine.tiers
        latest = dict.fromkeys(key for keys, _ in reversed(self._routes) for key in keys)
        stand_ins = _StandIns(levels, list(latest))
        self._forced = iter([route for _, route in self._routes])
        try:
            for module in self._layers:
                module.tiers = stand_ins
            return self.fill(rows, output_tokens)
        finally:
            self._forced = None
            for module in self._layers:
                module.tiers = levels

    def _enter(self, module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, selected, weights = args
        stack, _, block, *_ = self._layers[module]
        if self._forced is not None:
            selected = _one_hot(next(self._forced), selected)
        else:
            kept, chosen = selected.squeeze(1).max(dim=-1)
            route = torch.where(kept.bool(), chosen, -1)
            keys = [ExpertKey(_stack(stack), int(block), expert) for expert in set(route.tolist()) - {-1}]
            self._routes.append((keys, route))
            self.use.update(keys)
        self._entered = time.perf_counter()
        return hidden, selected, weights

    def _leave(self, module: Any, *_: Any) -> None:
        self._inside[_stack(self._layers[module][0])] += time.perf_counter() - self._entered

    def _end_of_encoder(self, *_: Any) -> None:
        self._encoder_end = time.perf_counter()
        self._encoder_counters = self._engine.tiers.counters()

    def _note_load(self, key: ExpertKey, segments: tuple[Segment, ...]) -> None:
        self.reads[key.stack] += [Range(each.file, each.offset, each.length) for each in segments]


class _StandIns:
    """In the place of the caches: gives the same few experts again and again, whatever is asked for."""

    def __init__(self, levels: ExpertTiers, keys: Sequence[ExpertKey]) -> None:
        self._gpus = {number: _StandIn(cache, keys) for number, cache in levels.gpus.items()}
        self._cpu = _StandIn(levels.cpu, keys)

    def on(self, device: torch.device) -> _StandIn:
        """Give the stand-in for what is computed on a device."""
        return self._cpu if device.type == "cpu" else self._gpus[device.index]


class _StandIn:
    """In the place of one cache."""

    def __init__(self, cache: ExpertCache | GpuCache, keys: Sequence[ExpertKey]) -> None:
        self._weights = itertools.cycle([weights for _, weights in cache.stream(keys[: cache.num_slots])])

    def stream(self, keys: Sequence[ExpertKey]) -> Generator[tuple[ExpertKey, ExpertWeights], None, None]:
        """Give an expert for each key at once."""
        yield from zip(keys, self._weights, strict=False)


def _stage_times(seconds: float, inside: float, levels: Mapping[str, CacheCounters]) -> StageTimes:
    gpus = CacheCounters()
    for tier, counters in levels.items():
        if tier != "cpu":
            gpus = gpus.plus(counters)
    return StageTimes(seconds, inside, total(levels), gpus)


def used_experts(use: Mapping[ExpertKey, int]) -> dict[str, dict[str, int]]:
    """Give the counts by layer (`encoder.3`) and expert, in order, as JSON has them."""
    result: dict[str, dict[str, int]] = {}
    for key in sorted(use, key=lambda key: (STACKS.index(key.stack), key.block, key.expert)):
        result.setdefault(f"{key.stack}.{key.block}", {})[str(key.expert)] = use[key]
    return result


def _stack(name: str) -> Stack:
    return "encoder" if name == "encoder" else "decoder"


def _one_hot(route: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Give `[tokens, 1, num_experts]` of each token's expert, all zero for -1."""
    result = torch.zeros_like(like)
    kept = (route >= 0).nonzero().squeeze(1)
    result[kept, 0, route[kept]] = 1
    return result
