"""The expert cache: a few slots for many experts, and the one that is needed last leaves first."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from switchrun.checkpoint.types import ExpertKey
from switchrun.experts.bookkeeping import CacheCounters, SlotTable
from switchrun.experts.buffers import Buffers
from switchrun.experts.formats import Format
from switchrun.experts.reader import Reader, Segment
from switchrun.experts.source import Load
from switchrun.kernels.matrices import ExpertWeights

#: Experts one after another, each valid until the next is asked for.
Stream = Generator[tuple[ExpertKey, ExpertWeights], None, None]


@dataclass(frozen=True, slots=True)
class _Arrival:
    """How a read ended: an expert in its slot, an error, or None if the store's copy is no good: load it again."""

    key: ExpertKey
    outcome: ExpertWeights | BaseException | None


class ExpertCache:
    """Keeps experts in equal slots and brings missing ones from disk.

    One thread (the model's) calls `stream`; reader threads only fill buffers. A context manager: leaving it waits for
    reads in flight and closes the files.

    `slots`, at least one, hold the experts that are kept; `staging` those on their way that must be converted. The
    cache owns the reader from now on.
    """

    def __init__(self, expert_format: Format, slots: Buffers, staging: Buffers, reader: Reader) -> None:
        self.slots = slots
        #: Called with each expert that is about to be read and with its reads, in order; for measurements.
        self.on_load: Callable[[ExpertKey, tuple[Segment, ...]], None] | None = None
        self._format = expert_format
        self._staging = staging
        self._reader = reader
        self._table = SlotTable(slots.count)
        self._free_staging = list(range(staging.count))
        self._arrived: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
        self._in_flight = 0
        self._busy_lock = threading.Lock()
        self._busy, self._busy_since = 0, 0.0
        self._read_bytes = 0

    @property
    def num_slots(self) -> int:
        """Experts that memory holds."""
        return self.slots.count

    @property
    def reads_past_page_cache(self) -> bool:
        """Whether what was read came from the disk itself."""
        return self._reader.reads_past_page_cache

    @property
    def read_bytes(self) -> int:
        """Bytes that have arrived: unlike the counters' `load_bytes`, which count a read when it begins."""
        return self._read_bytes

    def counters(self) -> CacheCounters:
        """Return a snapshot of the counters."""
        with self._busy_lock:
            return replace(self._table.counters)

    def stream(self, keys: Sequence[ExpertKey]) -> Stream:
        """Yield different experts, each as soon as it is in memory: first those that are, then arrivals.

        Reads of missing experts are submitted now, as far as there are slots; when there are fewer slots than experts,
        each slot is used again as soon as its expert has been computed. Blocks while nothing has arrived yet. An expert
        that cannot be read is a `CorruptCheckpointError`.
        """
        stream = self._visit(keys)
        next(stream)
        return cast(Stream, stream)

    def _visit(self, keys: Sequence[ExpertKey]) -> Generator[tuple[ExpertKey, ExpertWeights] | None, None, None]:
        """Yield None once the reads are submitted, then the experts."""
        hits, missing_keys = self._table.ask(keys)
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
                arrival = self._next_arrival()
                if isinstance(arrival.outcome, BaseException):
                    raise arrival.outcome
                if arrival.outcome is None:
                    missing.appendleft(arrival.key)
                else:
                    yield arrival.key, arrival.outcome
                    self._table.policy.release(arrival.key)
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
            buffers, index = (self.slots, slot) if staging is None else (self._staging, staging)
            if self.on_load is not None:
                self.on_load(key, load.plan.segments)
            nbytes = self._reader.submit(
                load.plan.segments,
                buffers[index].data,
                partial(self._finish, load, slot, staging),
                new=buffers.first_use(index),
            )
            counters = self._table.counters
            counters.loads += 1
            counters.load_bytes += nbytes
            if load.from_hub:
                counters.hub_loads += 1
                counters.hub_bytes += nbytes

    def _finish(self, load: Load, slot: int, staging: int | None, error: BaseException | None) -> None:
        """Make weights of what was read; on a reader thread, so that a conversion does not hold up the model."""
        outcome: ExpertWeights | BaseException | None
        try:
            if error is not None:
                raise error
            if staging is None:
                outcome = self._format.place(load, self.slots[slot])
            else:
                outcome = self._format.convert(load, self._staging[staging], self.slots[slot])
        except BaseException as failure:  # handed to the model's thread
            outcome = failure
            with contextlib.suppress(Exception):  # whatever goes wrong here, somebody waits for the arrival
                if load.give_up(failure):
                    outcome = None
                    for segment in load.plan.segments:
                        self._reader.forget(segment.file)
        if staging is not None:
            self._free_staging.append(staging)
        self._note_busy(-1, 0 if error else sum(segment.length for segment in load.plan.segments))
        self._arrived.put(_Arrival(load.key, outcome))

    def _next_arrival(self) -> _Arrival:
        """Wait for a read to end; the time is counted."""
        counters = self._table.counters
        start = time.perf_counter()
        try:
            arrival = self._arrived.get()
        finally:
            counters.wait_seconds += time.perf_counter() - start
        self._in_flight -= 1
        self._note(arrival)
        if arrival.outcome is None:
            counters.loads -= 1
        return arrival

    def _note(self, arrival: _Arrival) -> None:
        """Put an arrival into the books: its slot is filled, or free again."""
        if isinstance(arrival.outcome, ExpertWeights):
            self._table.entries[arrival.key].weights = arrival.outcome
        else:
            self._table.free.append(self._table.entries.pop(arrival.key).slot)

    def _recover(self) -> None:
        """Leave nothing in flight and nothing in use: a read failed, the caller stopped early, or a signal came.

        A signal may have come between any two steps, so the books are made again from what is there.
        """
        self._reader.abandon()
        while not self._arrived.empty():
            arrival = self._arrived.get()
            if arrival.key in self._table.entries:
                self._note(arrival)
        self._table.rebuild()
        self._free_staging = list(range(self._staging.count))
        self._in_flight = 0
        self._note_busy(-self._busy)

    def _note_busy(self, change: int, read_bytes: int = 0) -> None:
        with self._busy_lock:
            self._read_bytes += read_bytes
            now = time.perf_counter()
            if self._busy:
                self._table.counters.load_seconds += now - self._busy_since
            self._busy += change
            self._busy_since = now

    def clear(self) -> None:
        """Forget every expert, so that each is read again; the slots keep their memory. Not while `stream` runs."""
        self._table.drop(self._table.entries)

    def close(self) -> None:
        """End reads in flight and close the files; the slots go when the last view of them does."""
        self._reader.close()

    def __enter__(self) -> ExpertCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
