"""Writes experts behind the model's back."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections import deque

from switchrun.checkpoint.types import ExpertKey
from switchrun.store.expert_store import ExpertStore
from switchrun.store.files import PAGE


class BackgroundWriter:
    """One thread that stores experts from buffers of its own.

    The disk may be slower than the model meets new experts. Then what does not fit into the buffers is not stored:
    it will be met again, and must not make the model wait now.

    It owns its thread and its buffers until `close`; a buffer takes an expert's bytes of memory once it was used.
    Nothing that happens on the thread is raised anywhere.
    """

    def __init__(self, store: ExpertStore, buffers: int = 2) -> None:
        size = max(-(-store.layout.nbytes // PAGE) * PAGE, PAGE)
        self._store = store
        self._memory = [mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(buffers)]
        for memory in self._memory:
            # The first copy into a buffer makes the model wait for its pages: 23 ms for 25 MB of small ones.
            with contextlib.suppress(OSError, AttributeError):
                memory.madvise(mmap.MADV_HUGEPAGE)
        self._free = list(range(buffers))
        #: What was accepted, from before the copy until after the write; of that, what waits for the thread.
        self._waiting: set[ExpertKey] = set()
        self._queue: deque[tuple[ExpertKey, int]] = deque()
        self._closed = False
        self._changed = threading.Condition()
        # A daemon: a process that dies of an error must not wait for its disk. The next one cleans up behind it.
        self._thread = threading.Thread(target=self._run, name="switchrun-writer", daemon=True)
        self._thread.start()

    @property
    def buffer_bytes(self) -> int:
        """Memory that the buffers can take."""
        return sum(map(len, self._memory))

    def offer(self, key: ExpertKey, data: memoryview) -> bool:
        """Have an expert stored; blocks only for the copy of its data into a buffer.

        Returns:
            False if no buffer is free, or nothing is written any more; True if it will be tried, or is being tried.

        Raises:
            ValueError: The data has another length than the layout.
        """
        view = memoryview(data).cast("B")
        if len(view) != self._store.layout.nbytes:
            raise ValueError(f"an expert has {self._store.layout.nbytes} bytes here, not {len(view)}")
        with self._changed:
            if self._closed or not self._store.writable:
                return False
            if key in self._waiting:
                return True
            if not self._free:
                return False
            index = self._free.pop()
            self._waiting.add(key)
        # Outside of the lock: the buffer belongs to this call, and the thread may go on meanwhile.
        try:
            memoryview(self._memory[index])[: len(view)] = view
        except BaseException:  # a signal; `flush` must not wait for it
            self._done(key, index)
            raise
        with self._changed:
            self._queue.append((key, index))
            self._changed.notify_all()
        return True

    def flush(self) -> None:
        """Block until everything that was accepted has been written, or has failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)

    def close(self, finish: bool = True) -> None:
        """End the thread; unless it shall `finish` what waits, only the expert being written is finished."""
        with self._changed:
            self._closed = True
            while self._queue and not finish:
                self._done(*self._queue.popleft())
            self._changed.notify_all()
        self._thread.join()
        self._memory.clear()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                key, index = self._queue.popleft()
            try:
                # Another process may have stored it since the model asked.
                if self._store.find(key) is None:
                    self._store.write(key, memoryview(self._memory[index])[: self._store.layout.nbytes])
            except Exception as error:  # the fill must go on, whatever this is
                self._store.stop_writing(f"{type(error).__name__}: {error}")
            finally:
                self._done(key, index)

    def _done(self, key: ExpertKey, index: int) -> None:
        with self._changed:
            self._free.append(index)
            self._waiting.discard(key)
            self._changed.notify_all()
