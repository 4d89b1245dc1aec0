"""Packs experts ahead of time, several side by side, and stores them."""

from __future__ import annotations

import contextlib
import fcntl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import torch

from switchrun.checkpoint.types import ExpertKey, SwitchCheckpoint
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.buffers import Buffers
from switchrun.experts.formats import as_stored, packed_views, plan_reads
from switchrun.experts.reader import FileReader
from switchrun.experts.ways import reading_way
from switchrun.kernels.matrices import ExpertWeights, quantise
from switchrun.planning.memory import buffer_for, reads_directly
from switchrun.planning.preparation import PreparedCounts, packed_buffer_bytes
from switchrun.store import ExpertStore, StoredExpert
from switchrun.store.paths import opened

_CALIBRATION_SECONDS = 0.5

#: Called on the caller's thread with the bytes done and the bytes in all.
OnBytes = Callable[[int, int], None]


_Outcome = Literal["written", "skipped", "rebuilt"]


class ExpertPacker:
    """Reads experts from a checkpoint, packs them and writes them into a store that was opened with `must_write`.

    `jobs` are worked on side by side, each on a thread and with two buffers of its own. `verify` reads experts that are
    stored, and writes them again where they are damaged; else they are skipped.
    """

    def __init__(self, checkpoint: SwitchCheckpoint, store: ExpertStore, jobs: int, verify: bool = False) -> None:
        self._checkpoint = checkpoint
        self._store = store
        self._jobs = jobs
        self._verify = verify
        self._direct = reads_directly(checkpoint)
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def run(self, keys: Sequence[ExpertKey], on_bytes: OnBytes = lambda _done, _total: None) -> PreparedCounts:
        """Pack experts; blocks until they are stored. `on_bytes` is called after each.

        Whatever is raised, also by `on_bytes` or a signal's handler, experts that were begun are finished before, so
        the store is as good as after any other end.
        """
        counts: Counter[_Outcome] = Counter()
        results: SimpleQueue[_Outcome | BaseException] = SimpleQueue()
        self._stopped.clear()
        jobs, file_bytes = min(self._jobs, len(keys)), self._store.file_bytes
        with contextlib.ExitStack() as stack:
            stack.enter_context(_few_threads(jobs))
            # A second process begins at the end, so that the two meet in the middle: each skips what the other stored.
            waiting = iter(keys if _is_first(self._store.folder, stack) else keys[::-1])
            reader = FileReader(self._direct, reading_way(self._checkpoint.experts) if self._direct else None)
            stack.callback(reader.close)
            pool = stack.enter_context(ThreadPoolExecutor(max(1, jobs), thread_name_prefix="switchrun-prepare"))
            stack.callback(self._stopped.set)
            on_bytes(0, len(keys) * file_bytes)
            for _ in range(jobs):
                pool.submit(self._work, waiting, reader, results)
            for number in range(1, len(keys) + 1):
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                counts[result] += 1
                on_bytes(number * file_bytes, len(keys) * file_bytes)
        return PreparedCounts(counts["written"] + counts["rebuilt"], counts["skipped"], counts["rebuilt"])

    def packing_seconds(self, key: ExpertKey) -> float:
        """Measure what packing takes for one expert, with all jobs at work; blocks for half a second."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_few_threads(self._jobs))
            reader = FileReader(self._direct)
            stack.callback(reader.close)
            pool = stack.enter_context(ThreadPoolExecutor(self._jobs))

            def rate(_: int) -> float:
                return _Job(self._checkpoint, self._store, reader, self._direct).packing_rate(key)

            return 1 / sum(pool.map(rate, range(self._jobs)))

    def _work(
        self, waiting: Iterator[ExpertKey], reader: FileReader, results: SimpleQueue[_Outcome | BaseException]
    ) -> None:
        try:
            job = _Job(self._checkpoint, self._store, reader, self._direct)
            while not self._stopped.is_set():
                with self._lock:
                    key = next(waiting, None)
                if key is None:
                    return
                results.put(self._one(key, job))
        except BaseException as error:  # raised again by `run`
            results.put(error)

    def _one(self, key: ExpertKey, job: _Job) -> _Outcome:
        was_there = self._store.has_file(key)
        stored = self._store.find(key)
        if stored is not None and (not self._verify or job.is_whole(key, stored)):
            return "skipped"
        if stored is not None:
            self._store.discard(key)
        job.store(key)
        return "rebuilt" if was_there else "written"


class _Job:
    """The buffers of one thread, and what is done with them."""

    def __init__(self, checkpoint: SwitchCheckpoint, store: ExpertStore, reader: FileReader, direct: bool) -> None:
        sample = next(iter(checkpoint.experts.values()))
        self._store = store
        self._reader = reader
        self._slices = checkpoint.experts
        self._direct = direct
        self._plain = Buffers(1, buffer_for(sample))[0]
        self._packed = Buffers(1, packed_buffer_bytes(store.layout))[0]
        self._into = packed_views(self._packed, store.layout, store.manifest.dtype, sample.wi.shape)

    def store(self, key: ExpertKey) -> None:
        """Read an expert from the checkpoint, pack and write it."""
        quantise(self._read(key), self._into)
        data = self._packed.data[: self._store.layout.nbytes]
        # False without an error: somebody cleared the folder just then. The second try makes it again.
        if not self._store.write(key, data):
            self._store.write(key, data)

    def packing_rate(self, key: ExpertKey) -> float:
        """Return how often an expert is packed in a second."""
        matrices = self._read(key)
        quantise(matrices, self._into)  # The first time touches memory that is new.
        start, count, seconds = time.perf_counter(), 0, 0.0
        while seconds < _CALIBRATION_SECONDS:
            quantise(matrices, self._into)
            count += 1
            seconds = time.perf_counter() - start
        return count / seconds

    def _read(self, key: ExpertKey) -> ExpertWeights:
        slices = self._slices[key]
        plan = plan_reads(slices, self._direct)
        self._reader.read(plan.segments, self._plain.data)
        return as_stored(slices, plan, self._plain)

    def is_whole(self, key: ExpertKey, stored: StoredExpert) -> bool:
        """Read a stored expert and look at its checksum."""
        data = self._packed.data[: stored.nbytes]
        try:
            segment = self._reader.segment(stored.path, stored.offset, stored.nbytes)
            self._reader.read([replace(segment, stored=True)], self._packed.data)
            whole = self._store.verify(key, data)
        except CorruptCheckpointError:
            whole = False
        self._reader.forget(stored.path)
        if not whole:
            # Also what lies between the parts, which packing leaves as it is.
            data[:] = bytes(len(data))
        return whole


def _is_first(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Whether no other process prepares the same store; this one then does, until the stack is closed."""
    try:
        fcntl.flock(stack.enter_context(opened(folder)), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # The folder was cleared just now, or its filesystem has no locks.
    return True


@contextmanager
def _few_threads(jobs: int) -> Iterator[None]:
    """Share torch's threads, in the whole process, among the jobs: each would start as many as there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // max(1, jobs)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
