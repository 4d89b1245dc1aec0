"""The cache's fast level: slots on a GPU, filled from the experts in CPU memory while the GPU computes."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

import torch

from switchrun.checkpoint.types import ExpertKey
from switchrun.experts.accelerator import CopyStream, PageLocks
from switchrun.experts.cache import ExpertCache
from switchrun.experts.counters import CacheCounters
from switchrun.experts.slot_table import SlotTable
from switchrun.kernels.matrices import ExpertWeights, moved
from switchrun.planning.memory import GPU_ALIGNMENT


class GpuCache:
    """Keeps experts in equal slots on one GPU; what is missing there comes from the cache in CPU memory.

    Two copies of an expert may exist, one on each level: what leaves the GPU stays in CPU memory as long as that
    level's own policy keeps it. One thread calls `stream`.

    No slot is overwritten while it is used: a copy waits, on a stream of its own, for an event that was recorded after
    the slot's last expert was given to the GPU to compute, and computing waits for the copy. The slot in CPU memory is
    let go of once its copy is made. So while one expert is computed, the next is copied.

    Args:
        source: The cache in CPU memory; it stays the caller's.
        place: The GPU.
        num_slots: Experts that it holds, at least 1; all are allocated now.
        slot_bytes: Size of a slot.
        locks: Page-locks the slots in CPU memory; it stays the caller's.

    Raises:
        torch.OutOfMemoryError: The GPU has less memory.
    """

    def __init__(
        self, source: ExpertCache, place: torch.device, num_slots: int, slot_bytes: int, locks: PageLocks
    ) -> None:
        self._source = source
        self._locks = locks
        self._slots = [torch.empty(slot_bytes, dtype=torch.uint8, device=place) for _ in range(num_slots)]
        self._table = SlotTable(num_slots)
        self._stream = CopyStream(place)
        # The allocator may give out memory that is still being computed with.
        self._last_use: list[Any] = [self._stream.computed()] * num_slots
        self._counters = CacheCounters()

    @property
    def num_slots(self) -> int:
        """Experts that the GPU holds."""
        return len(self._slots)

    def counters(self) -> CacheCounters:
        """Give a snapshot of the counters; loads are copies from CPU memory."""
        return replace(self._counters)

    def stream(self, keys: Sequence[ExpertKey]) -> Generator[tuple[ExpertKey, ExpertWeights], None, None]:
        """Give experts one after another: first those on the GPU, then the others as they arrive in CPU memory.

        An expert may be computed with until the next one is asked for. Reads are submitted before hits are given.

        Args:
            keys: Different experts, in any order.

        Raises:
            CorruptCheckpointError: An expert cannot be read.
        """
        hits, missing = self._table.ask(keys, self._counters)
        before: ExpertKey | None = None
        finished = False
        try:
            with closing(self._source.begin(missing)) as arrivals:
                for key in hits:
                    entry = self._table.entries[key]
                    assert entry.weights is not None
                    yield key, entry.weights
                    before = self._done(key, before)
                for key, weights in arrivals:
                    slot = self._table.take()
                    if slot is None and before is not None:  # a single slot
                        self._table.policy.release(before)
                        before, slot = None, self._table.take()
                    assert slot is not None
                    there = self._copy(weights, slot)
                    copied = self._stream.copied()
                    self._table.put(key, slot, there)
                    yield key, there
                    before = self._done(key, before)
                    start = time.perf_counter()
                    copied.synchronize()
                    self._counters.wait_seconds += time.perf_counter() - start
            if before is not None:
                self._table.policy.release(before)
            finished = True
        finally:
            if not finished:
                self._recover()

    def _done(self, key: ExpertKey, before: ExpertKey | None) -> ExpertKey:
        """Note that an expert is being computed; it is kept until the next one has a slot, the one before no longer."""
        self._last_use[self._table.entries[key].slot] = self._stream.computed()
        if before is not None:
            self._table.policy.release(before)
        return key

    def _copy(self, weights: ExpertWeights, slot: int) -> ExpertWeights:
        """Have an expert copied into a slot, matrix by matrix."""
        begin = 0

        def place(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal begin
            self._locks.lock(tensor)
            stored = tensor if tensor.is_contiguous() else tensor.t()  # a transposed one is moved as it lies
            target = self._slots[slot][begin : begin + stored.nbytes].view(stored.dtype).view(stored.shape)
            target.copy_(stored, non_blocking=True)
            begin += -(-stored.nbytes // GPU_ALIGNMENT) * GPU_ALIGNMENT
            self._counters.load_bytes += stored.nbytes
            return target if stored is tensor else target.t()

        self._counters.loads += 1
        with self._stream.copying(after=self._last_use[slot]):
            return moved(weights, place)

    def _recover(self) -> None:
        """Leave no copy on its way and nothing in use: computing failed, the caller stopped early, or a signal came."""
        self._stream.finish()
        self._last_use = [self._stream.computed()] * self.num_slots
        self._table.rebuild()

    def shrink(self) -> bool:
        """Give up half of the slots, with what lies in them; False if there is only one. Not while `stream` runs."""
        count = self.num_slots // 2
        if not count:
            return False
        self._stream.finish()
        self._table.keep_only(count)
        del self._slots[count:], self._last_use[count:]
        return True

    def clear(self) -> None:
        """Forget every expert; the slots keep their memory. Not while `stream` runs."""
        self._table.drop(self._table.entries)

    def close(self) -> None:
        """Wait for copies and give the slots up; their memory goes when the last view of them does."""
        self._stream.finish()
        self._table.drop(self._table.entries)
        self._slots.clear()


class ExpertTiers:
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

    def __enter__(self) -> ExpertTiers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
