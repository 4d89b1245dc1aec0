"""The levels of the expert cache: one in CPU memory, and on each GPU that computes a smaller one in front of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch

from switchrun.experts.accelerator import PageLocks
from switchrun.experts.cache import ExpertCache
from switchrun.experts.gpu_cache import GpuCache
from switchrun.experts.slot_table import CacheCounters


class ExpertLevels:
    """Gives each device its cache. A context manager: leaving it gives the GPUs' slots up.

    Args:
        cpu: The cache in CPU memory, which all GPUs share; it stays the caller's.

    Attributes:
        cpu: The same.
        gpus: The caches on GPUs, by their numbers.
    """

    def __init__(self, cpu: ExpertCache) -> None:
        self.cpu = cpu
        self.gpus: dict[int, GpuCache] = {}
        self._stack = ExitStack()
        self._locks: PageLocks | None = None

    def add(self, place: torch.device, num_slots: int, slot_bytes: int) -> None:
        """Put a level on a GPU; its memory is taken now.

        Raises:
            torch.OutOfMemoryError: The GPU has less memory.
        """
        if self._locks is None:
            self._locks = PageLocks(self.cpu.memory, self.cpu.slot_bytes, place)
            self._stack.callback(self._locks.close)
        cache = GpuCache(self.cpu, place, num_slots, slot_bytes, self._locks)
        self._stack.callback(cache.close)
        self.gpus[place.index] = cache

    def on(self, device: torch.device) -> ExpertCache | GpuCache:
        """Give the cache for what is computed on a device."""
        return self.cpu if device.type == "cpu" else self.gpus[device.index]

    def counters(self) -> Mapping[str, CacheCounters]:
        """Give a snapshot of each level's counters by the name of its tier, fast to slow.

        What a GPU has not is asked of CPU memory: one that misses both times counts as a request of both.
        """
        gpus = {f"gpu:{number}": cache.counters() for number, cache in sorted(self.gpus.items())}
        return {**gpus, "cpu": self.cpu.counters()}

    def shrink(self) -> bool:
        """Let each GPU give up half of its slots; False if none has more than one."""
        given_up = [cache.shrink() for cache in self.gpus.values()]
        return any(given_up)

    def clear(self) -> None:
        """Forget every expert on every level. Not while one is in use."""
        for cache in self.gpus.values():
            cache.clear()
        self.cpu.clear()

    def __enter__(self) -> ExpertLevels:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def since(levels: Mapping[str, CacheCounters], earlier: Mapping[str, CacheCounters]) -> dict[str, CacheCounters]:
    """Give what each level counted after an earlier snapshot."""
    return {tier: counters.since(earlier[tier]) for tier, counters in levels.items()}


def total(levels: Mapping[str, CacheCounters]) -> CacheCounters:
    """Give the counters of all levels as one cache's: a hit is an expert that was in memory, a load one that was read.

    Args:
        levels: What `ExpertLevels.counters` or `since` gives.
    """
    cpu = levels["cpu"]
    hits = sum(counters.hits for tier, counters in levels.items() if tier != "cpu")
    waited = sum(counters.wait_seconds for counters in levels.values())
    return CacheCounters(
        # What a GPU missed is a request of the CPU's already.
        cpu.requests + hits, cpu.hits + hits, cpu.loads, cpu.load_bytes, cpu.load_seconds, waited
    )  # fmt: skip
