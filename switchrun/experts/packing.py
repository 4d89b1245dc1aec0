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
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import torch

from switchrun.checkpoint.remote import HubRanges
from switchrun.checkpoint.types import ExpertKey, SwitchCheckpoint
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.buffers import Buffers
from switchrun.experts.formats import packed_views
from switchrun.experts.hub_reader import HubReader
from switchrun.experts.reader import FileReader, Reader, SplitReader, Way
from switchrun.experts.source import DamagedExpertError, ExpertSource, as_stored, plan_reads, stored_read
from switchrun.experts.ways import reading_way
from switchrun.kernels.matrices import ExpertWeights, quantise
from switchrun.planning.memory import buffer_for
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
    stored, and writes them again where they are damaged; else they are skipped. `hub` is what reads from the Hub,
    if experts come from there; it is closed when the packer has run.
    """

    def __init__(
        self,
        checkpoint: SwitchCheckpoint,
        store: ExpertStore,
        jobs: int,
        verify: bool = False,
        hub: HubRanges | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._source = ExpertSource.open(checkpoint, store.folder.parent.parent, keep=False)
        self._store = store
        self._hub = hub
        self._jobs = jobs
        self._verify = verify
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
            way = reading_way(self._checkpoint.experts, self._store.folder) if self._source.direct else None
            reader = self._open_reader(stack, way)
            pool = stack.enter_context(ThreadPoolExecutor(max(1, jobs), thread_name_prefix="switchrun-prepare"))
            stack.callback(self._stopped.set)
            if self._hub is not None:
                stack.callback(self._hub.close)  # whoever stops does not wait for a network
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
            reader = self._open_reader(stack)
            pool = stack.enter_context(ThreadPoolExecutor(self._jobs))

            def rate(_: int) -> float:
                return self._job(reader).packing_rate(key)

            return 1 / sum(pool.map(rate, range(self._jobs)))

    def _open_reader(self, stack: contextlib.ExitStack, way: Way | None = None) -> Reader:
        files = FileReader(self._source.direct, way)
        reader = files if self._hub is None else SplitReader(files, HubReader(self._hub))
        stack.callback(reader.close)
        return reader

    def _job(self, reader: Reader) -> _Job:
        return _Job(
            max(buffer_for(form) for form, _ in self._checkpoint.expert_forms), self._source, self._store, reader
        )

    def _work(
        self, waiting: Iterator[ExpertKey], reader: Reader, results: SimpleQueue[_Outcome | BaseException]
    ) -> None:
        try:
            job = self._job(reader)
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

    def __init__(self, plain_bytes: int, source: ExpertSource, store: ExpertStore, reader: Reader) -> None:
        self._source = source
        self._store = store
        self._reader = reader
        self._plain = Buffers(1, plain_bytes)[0]
        self._packed = Buffers(1, packed_buffer_bytes(store.layout))[0]
        shape = next(iter(source.slices.values())).wi.shape
        self._into = packed_views(self._packed, store.layout, store.manifest.dtype, shape)

    def store(self, key: ExpertKey) -> None:
        """Read an expert from the checkpoint, pack and write it."""
        quantise(self._read(key), self._into)
        data = self._packed.data[: self._store.layout.nbytes]
        # False without an error: somebody cleared the folder just then. The second try makes it again.
        if not self._store.write(key, data):
            self._store.write(key, data)

    def packing_rate(self, key: ExpertKey) -> float:
        """Return how often an expert is packed in a second."""
        # Whatever the buffer holds: how long it takes does not depend on the numbers.
        slices = self._source.slices[key]
        matrices = as_stored(key, slices, plan_reads(slices, self._source.direct), self._plain)
        quantise(matrices, self._into)  # The first time touches memory that is new.
        start, count, seconds = time.perf_counter(), 0, 0.0
        while seconds < _CALIBRATION_SECONDS:
            quantise(matrices, self._into)
            count += 1
            seconds = time.perf_counter() - start
        return count / seconds

    def _read(self, key: ExpertKey) -> ExpertWeights:
        while True:
            load = self._source.load(key)
            try:
                self._reader.read(load.plan.segments, self._plain.data)
                return self._source.weights(load, self._plain)
            except (CorruptCheckpointError, DamagedExpertError) as error:
                if not load.give_up(error):
                    raise
                self._reader.forget(load.plan.segments[0].file)

    def is_whole(self, key: ExpertKey, stored: StoredExpert) -> bool:
        """Read a stored expert and look at its checksum."""
        data = self._packed.data[: stored.nbytes]
        try:
            self._reader.read([stored_read(stored, self._source.direct)], self._packed.data)
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
