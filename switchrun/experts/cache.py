"""The expert cache: a few slots for many experts, and the one that is needed last leaves first."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from mmap import mmap
from typing import cast

import torch

from switchrun.checkpoint.types import ExpertKey, ExpertSlices
from switchrun.experts.buffers import Buffers
from switchrun.experts.counters import CacheCounters
from switchrun.experts.formats import Format, Load, PlainFormat
from switchrun.experts.reader import WAYS, FileReader, Segment, Way
from switchrun.experts.slot_table import SlotTable
from switchrun.kernels.matrices import ExpertWeights

#: What `stream` gives.
Stream = Generator[tuple[ExpertKey, ExpertWeights], None, None]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """An expert is in its slot."""

    key: ExpertKey
    weights: ExpertWeights


@dataclass(frozen=True, slots=True)
class _Failed:
    """An expert could not be brought in."""

    key: ExpertKey
    error: BaseException


@dataclass(frozen=True, slots=True)
class _Retry:
    """What the store gave was no good: the expert is to be loaded again, which takes another way."""

    key: ExpertKey


class ExpertCache:
    """Keeps experts in equal slots and brings missing ones from disk.

    One thread (the model's) calls `stream`; reader threads only fill buffers. A context manager: leaving it waits for
    reads in flight and closes the files.

    Args:
        slices: Where every expert lies.
        dtype: The dtype of the weights that are given out.
        num_slots: Experts that memory holds, at least 1.
        slot_bytes: Size of a slot.
        staging: Number and size of the buffers for experts that must be converted; (0, 0) if none must.
        direct: Read past the page cache.
        way: How the disk is read.
        slot_format: How experts are brought in, if they are neither kept as stored nor converted to `dtype`.

    Attributes:
        on_load: Called with each expert that is about to be read and with its reads, in order; for measurements.
    """

    def __init__(
        self,
        slices: Mapping[ExpertKey, ExpertSlices],
        dtype: torch.dtype,
        num_slots: int,
        slot_bytes: int,
        staging: tuple[int, int] = (0, 0),
        direct: bool = True,
        way: Way = WAYS[0],
        slot_format: Format | None = None,
    ) -> None:
        self._format = slot_format or PlainFormat(slices, dtype, direct)
        self._slots = Buffers(num_slots, slot_bytes)
        self._staging = Buffers(*staging)
        self._reader = FileReader(direct, way)
        self._table = SlotTable(num_slots)
        self._free_staging = list(range(staging[0]))
        self._arrived: queue.SimpleQueue[_Loaded | _Failed | _Retry] = queue.SimpleQueue()
        self._in_flight = 0
        self._busy_lock = threading.Lock()
        self._busy, self._busy_since = 0, 0.0
        self._counters = CacheCounters()
        self.on_load: Callable[[ExpertKey, tuple[Segment, ...]], None] | None = None

    @property
    def num_slots(self) -> int:
        """Experts that memory holds."""
        return self._slots.count

    @property
    def slot_bytes(self) -> int:
        """Size of a slot."""
        return self._slots.size

    @property
    def memory(self) -> mmap:
        """The mapping that all slots lie in."""
        return self._slots.memory

    @property
    def reads_past_page_cache(self) -> bool:
        """Whether what was read came from the disk itself."""
        return self._reader.reads_past_page_cache

    def counters(self) -> CacheCounters:
        """Return a snapshot of the counters."""
        with self._busy_lock:
            return replace(self._counters)

    def stream(self, keys: Sequence[ExpertKey]) -> Stream:
        """Give experts one after another, each as soon as it is in memory: first those that are, then arrivals.

        An expert's weights are valid until the next one is asked for. Reads of missing experts are all submitted at
        once, as far as there are slots; when there are fewer slots than experts, each slot is used again as soon as
        its expert has been computed. Blocks while nothing has arrived yet.

        Args:
            keys: Different experts, in any order.

        Raises:
            CorruptCheckpointError: An expert cannot be read.
        """
        yield from self.begin(keys)

    def begin(self, keys: Sequence[ExpertKey]) -> Stream:
        """Do what `stream` does, but submit the reads now and not when the first expert is asked for."""
        stream = self._visit(keys)
        next(stream)
        return cast(Stream, stream)

    def _visit(self, keys: Sequence[ExpertKey]) -> Generator[tuple[ExpertKey, ExpertWeights] | None, None, None]:
        """Yield None once the reads are submitted, then the experts."""
        hits, missing_keys = self._table.ask(keys, self._counters)
        missing = deque(missing_keys)
        finished = False
        try:
            self._submit(missing)
            yield None
            for key in hits:
                weights = self._table.entries[key].weights
                assert weights is not None
                yield key, weights
                self._table.policy.release(key)
                self._submit(missing)
            while self._in_flight:
                match self._next_arrival():
                    case _Loaded(key, weights):
                        yield key, weights
                        self._table.policy.release(key)
                    case _Retry(key):
                        missing.appendleft(key)
                    case _Failed(_, error):
                        raise error
                self._submit(missing)
            finished = True
        finally:
            if not finished:
                self._recover()

    def _submit(self, missing: deque[ExpertKey]) -> None:
        """Start as many reads as there are slots that nobody uses."""
        while missing:
            load = self._format.load(missing[0])
            if load.staged and not self._free_staging:
                return
            slot = self._table.take()
            if slot is None:
                return
            key = missing.popleft()
            staging = self._free_staging.pop() if load.staged else None
            self._table.put(key, slot, None)
            self._in_flight += 1
            self._note_busy(+1)
            buffers, index = (self._slots, slot) if staging is None else (self._staging, staging)
            if self.on_load is not None:
                self.on_load(key, load.plan.segments)
            self._counters.loads += 1
            self._counters.load_bytes += self._reader.submit(
                load.plan.segments,
                buffers.view(index),
                partial(self._finish, load, slot, staging),
                new=buffers.first_use(index),
            )

    def _finish(self, load: Load, slot: int, staging: int | None, error: BaseException | None) -> None:
        """Make weights of what was read; on a reader thread, so that a conversion does not hold up the model."""
        arrival: _Loaded | _Failed | _Retry
        try:
            if error is not None:
                raise error
            if staging is None:
                weights = self._format.place(load, self._slots, slot)
            else:
                weights = self._format.convert(load, self._staging, staging, self._slots, slot)
            arrival = _Loaded(load.key, weights)
        except BaseException as failure:  # handed to the model's thread
            arrival = _Failed(load.key, failure)
            with contextlib.suppress(Exception):  # whatever goes wrong here, somebody waits for the arrival
                if self._format.give_up(load, failure):
                    arrival = _Retry(load.key)
                    for segment in load.plan.segments:
                        self._reader.forget(segment.file)
        if staging is not None:
            self._free_staging.append(staging)
        self._note_busy(-1)
        self._arrived.put(arrival)

    def _next_arrival(self) -> _Loaded | _Failed | _Retry:
        """Wait for a read to end; the time is counted."""
        start = time.perf_counter()
        try:
            arrival = self._arrived.get()
        finally:
            self._counters.wait_seconds += time.perf_counter() - start
        self._in_flight -= 1
        self._note(arrival)
        if isinstance(arrival, _Retry):
            self._counters.loads -= 1
        return arrival

    def _note(self, arrival: _Loaded | _Failed | _Retry) -> None:
        """Put an arrival into the books: its slot is filled, or free again."""
        if isinstance(arrival, _Loaded):
            self._table.entries[arrival.key].weights = arrival.weights
        else:
            self._table.free.append(self._table.entries.pop(arrival.key).slot)

    def _recover(self) -> None:
        """Leave nothing in flight and nothing in use: a read failed, the caller stopped early, or a signal came.

        A signal may have come between any two steps, so the books are made again from what is there.
        """
        self._reader.wait()
        while not self._arrived.empty():
            arrival = self._arrived.get()
            if arrival.key in self._table.entries:
                self._note(arrival)
        self._table.rebuild()
        self._free_staging = list(range(self._staging.count))
        self._in_flight = 0
        self._note_busy(-self._busy)

    def _note_busy(self, change: int) -> None:
        with self._busy_lock:
            now = time.perf_counter()
            if self._busy:
                self._counters.load_seconds += now - self._busy_since
            self._busy += change
            self._busy_since = now

    def clear(self) -> None:
        """Forget every expert, so that each is read again; the slots keep their memory. Not while `stream` runs."""
        self._table.drop(self._table.entries)

    def close(self) -> None:
        """Wait for reads in flight and close the files; the slots go when the last view of them does."""
        self._reader.close()

    def __enter__(self) -> ExpertCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
