"""Quantises experts ahead of time, several side by side, and stores them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum, auto
from pathlib import Path
from queue import SimpleQueue

import torch

from switchrun.checkpoint.types import ExpertKey, SwitchCheckpoint
from switchrun.experts.buffers import Buffers
from switchrun.experts.formats import as_stored, packed_views
from switchrun.experts.probe import reading_way
from switchrun.experts.reader import WAYS, FileReader, plan_reads
from switchrun.kernels.matrices import ExpertWeights, quantise
from switchrun.planning.memory import buffer_for, reads_directly
from switchrun.planning.preparation import PreparedCounts, packed_buffer_bytes
from switchrun.store import ExpertStore, StoredExpert
from switchrun.store.paths import expert_path

_CALIBRATION_SECONDS = 0.5

#: Called on the caller's thread with the bytes done and the bytes in all.
OnBytes = Callable[[int, int], None]


class _Outcome(Enum):
    WRITTEN = auto()
    SKIPPED = auto()
    REBUILT = auto()


class ExpertPreparer:
    """Reads experts from a checkpoint, quantises them and writes them into a store.

    Its memory is two buffers for each job, whatever the number of experts.

    Args:
        checkpoint: Where they come from.
        store: Where they go to; opened with `must_write`.
        jobs: How many are worked on side by side, each on a thread of its own.
        verify: Read experts that are stored, and write them anew where they are damaged; else they are skipped.
    """

    def __init__(self, checkpoint: SwitchCheckpoint, store: ExpertStore, jobs: int, verify: bool = False) -> None:
        self._checkpoint = checkpoint
        self._store = store
        self._jobs = jobs
        self._verify = verify
        self._direct = reads_directly(checkpoint)
        self._slices = checkpoint.experts
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def run(self, keys: Sequence[ExpertKey], on_bytes: OnBytes = lambda _done, _total: None) -> PreparedCounts:
        """Prepare experts; blocks until they are stored.

        Whatever is raised, also by `on_bytes` or a signal's handler, experts that were begun are finished before, so
        the store is as good as after any other end.

        Args:
            keys: Which.
            on_bytes: Told after each expert.

        Raises:
            CorruptCheckpointError: The checkpoint cannot be read.
            StorageError: The store cannot be written.
        """
        counts = dict.fromkeys(_Outcome, 0)
        results: SimpleQueue[_Outcome | BaseException] = SimpleQueue()
        self._stopped.clear()
        jobs = min(self._jobs, len(keys))
        with contextlib.ExitStack() as stack:
            stack.enter_context(_few_threads(jobs))
            # A second process begins at the end, so that the two meet in the middle: each skips what the other stored.
            waiting = iter(keys if _is_first(self._store.folder, stack) else keys[::-1])
            reader = FileReader(self._direct, reading_way(self._slices) if self._direct else WAYS[0])
            stack.callback(reader.close)
            pool = stack.enter_context(ThreadPoolExecutor(max(1, jobs), thread_name_prefix="switchrun-prepare"))
            stack.callback(self._stopped.set)
            on_bytes(0, len(keys) * self._store.file_bytes)
            for _ in range(jobs):
                pool.submit(self._work, waiting, reader, results)
            for number in range(1, len(keys) + 1):
                result = results.get()
                if isinstance(result, BaseException):
                    raise result
                counts[result] += 1
                on_bytes(number * self._store.file_bytes, len(keys) * self._store.file_bytes)
        rebuilt = counts[_Outcome.REBUILT]
        return PreparedCounts(counts[_Outcome.WRITTEN] + rebuilt, counts[_Outcome.SKIPPED], rebuilt)

    def packing_seconds(self, key: ExpertKey) -> float:
        """Measure what quantising takes for one expert, with all jobs at work; blocks for about half a second.

        Args:
            key: The expert that is read, and quantised again and again. Nothing is stored.

        Raises:
            CorruptCheckpointError: The checkpoint cannot be read.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(_few_threads(self._jobs))
            reader = FileReader(self._direct, WAYS[0])
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
            while (key := self._next(waiting)) is not None:
                results.put(self._one(key, job))
        except BaseException as error:  # raised again by `run`
            results.put(error)

    def _next(self, waiting: Iterator[ExpertKey]) -> ExpertKey | None:
        with self._lock:
            return None if self._stopped.is_set() else next(waiting, None)

    def _one(self, key: ExpertKey, job: _Job) -> _Outcome:
        was_there = expert_path(self._store.folder, key).exists()
        stored = self._store.find(key)
        if stored is not None and (not self._verify or job.is_whole(key, stored)):
            return _Outcome.SKIPPED
        if stored is not None:
            self._store.discard(key)
        job.store(key)
        return _Outcome.REBUILT if was_there else _Outcome.WRITTEN


class _Job:
    """The buffers of one thread, and what is done with them."""

    def __init__(self, checkpoint: SwitchCheckpoint, store: ExpertStore, reader: FileReader, direct: bool) -> None:
        sample = next(iter(checkpoint.experts.values()))
        self._store = store
        self._reader = reader
        self._slices = checkpoint.experts
        self._direct = direct
        self._plain = Buffers(1, buffer_for(sample))
        self._packed = Buffers(1, packed_buffer_bytes(store.layout))
        d_ff, d_model = sample.wi.shape
        self._into = packed_views(self._packed, 0, store.layout, store.manifest.dtype, d_model, d_ff)

    def store(self, key: ExpertKey) -> None:
        """Read an expert from the checkpoint, quantise and write it."""
        quantise(self._read(key), self._into)
        data = self._packed.view(0)[: self._store.layout.nbytes]
        # False without an error: somebody cleared the folder just then. It is made anew for the second try.
        if not self._store.write(key, data):
            self._store.write(key, data)

    def packing_rate(self, key: ExpertKey) -> float:
        """Give how often an expert is quantised in a second."""
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
        self._reader.read(plan.segments, self._plain.view(0))
        return as_stored(slices, plan, self._plain, 0)

    def is_whole(self, key: ExpertKey, stored: StoredExpert) -> bool:
        """Read a stored expert and look at its checksum."""
        data = self._packed.view(0)[: stored.nbytes]
        got = 0
        try:
            with open(stored.path, "rb", buffering=0) as file:
                file.seek(stored.offset)
                while got < len(data) and (count := file.readinto(data[got:])):
                    got += count
                with contextlib.suppress(OSError):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError:
            got = 0
        whole = got == len(data) and self._store.verify(key, data)
        if not whole:
            # Also what lies between the parts, which quantising leaves as it is.
            self._packed.tensor(0, 0, torch.uint8, (len(data),)).zero_()
        return whole


def _is_first(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Tell whether no other process prepares the same store, and be the one that does until the stack is closed."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # The folder was cleared just now, or its filesystem has no locks.
    return True


@contextmanager
def _few_threads(jobs: int) -> Iterator[None]:
    """Share torch's threads among the jobs: each would start as many as there are cores.

    The setting belongs to the whole process, so it is put back.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // max(1, jobs)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
