"""Keeps a store's folder under a number of bytes: what was used least recently goes first."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from switchrun.checkpoint.types import ExpertKey
from switchrun.store.paths import expert_path, remove_stored, stored_experts

#: The folder is looked through again after this many times what that took: at most 5 % of the time goes into it.
_SCAN_SHARE = 20


class SizeLimit:
    """Makes room in a store's folder; any thread may call.

    The files' times of modification show, beyond the life of a process, when each was used (its store sets them; times
    of access are not kept by most mounts). Other processes may write into the folder: it is looked through again before
    room is made, unless that was done just now, so together they may exceed the limit by what they wrote meanwhile.

    Deleting a file that somebody reads is safe: Linux keeps its bytes while it is open. Only whoever knows a path and
    has not opened it yet finds nothing there, and takes the expert from the checkpoint as if it had never been stored.

    The limit counts the experts' headers too. `removed` is called with every expert that is deleted.
    """

    def __init__(self, folder: Path, limit_bytes: int, removed: Callable[[ExpertKey], None]) -> None:
        self._folder = folder
        self._limit = limit_bytes
        self._removed = removed
        self._sizes: dict[ExpertKey, int] = {}
        #: Bytes of files that are being written. A key may be in `_sizes` too: its file has just got its name, or the
        #: one that it replaces is there.
        self._reserved: Counter[ExpertKey] = Counter()
        self._lock = threading.Lock()
        self._used: dict[ExpertKey, int] = {}
        self._next_scan = float("-inf")

    def use(self, key: ExpertKey) -> None:
        """Note that an expert is used now."""
        self._used[key] = time.time_ns()

    def trim(self) -> None:
        """Delete experts until what is there is within the limit, which may be lower than it was last time."""
        with self._lock:
            self._make_room(0)

    def reserve(self, key: ExpertKey, size: int) -> bool:
        """Delete experts until `size` more bytes fit, and keep those for an expert's file until they are settled.

        False if they cannot fit: they exceed the limit alone, or files cannot be deleted.
        """
        with self._lock:
            if size > self._limit or not self._make_room(size):
                return False
            self._reserved[key] += size
            return True

    def settle(self, key: ExpertKey, size: int, written: bool) -> None:
        """Give reserved bytes back; if the file was written, it counts from now on."""
        with self._lock:
            self._reserved[key] -= size
            if not self._reserved[key]:
                del self._reserved[key]
            if written:
                self._sizes[key] = size
                self.use(key)

    def _make_room(self, size: int) -> bool:
        self._scan()
        excess = sum(self._sizes.values()) + size - self._limit
        # Each once: otherwise a job would delete experts for files of other jobs that have just been completed.
        excess += sum(count for key, count in self._reserved.items() if key not in self._sizes)
        if excess <= 0:
            return True
        for key in sorted(self._sizes, key=lambda key: self._used.get(key, 0)):
            try:
                remove_stored(expert_path(self._folder, key))
            except FileNotFoundError:
                pass
            except OSError:
                continue
            excess -= self._sizes.pop(key)
            self._used.pop(key, None)
            self._removed(key)
            if excess <= 0:
                return True
        return False

    def _scan(self) -> None:
        start = time.monotonic()
        if start < self._next_scan:
            return
        self._sizes.clear()
        for key, status in stored_experts(self._folder):
            self._sizes[key] = status.st_size
            self._used[key] = max(self._used.get(key, 0), status.st_mtime_ns)
        now = time.monotonic()
        self._next_scan = now + _SCAN_SHARE * (now - start)
