"""The files that readers have open: a few, however many there are."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from switchrun.errors import CorruptCheckpointError

#: Files kept open though nobody reads them at the moment: packed experts are a file each.
MOST_OPEN_FILES = 64


@dataclass(slots=True, eq=False)
class OpenFile:
    """A descriptor and how many reads use it; one that is retired is closed by the last of them."""

    descriptor: int
    direct: bool
    users: int = 0
    retired: bool = False


class OpenFiles:
    """Descriptors by path; those used longest ago are closed first. All methods may be called from any thread.

    It owns the descriptors until `close`.
    """

    def __init__(self) -> None:
        #: The one used last is the last.
        self._files: dict[Path, OpenFile] = {}
        self._lock = threading.Lock()
        self._any = self._any_buffered = False

    @property
    def all_direct(self) -> bool:
        """Whether there were files, and all of them are read past the page cache."""
        return self._any and not self._any_buffered

    def acquire(self, path: Path, direct: bool) -> OpenFile:
        """Give a file, opened if need be; the caller releases it.

        Args:
            path: Which file.
            direct: Open it past the page cache, where that is possible.

        Raises:
            CorruptCheckpointError: It cannot be opened.
        """
        with self._lock:
            file = self._files.pop(path, None) or self._open(path, direct)
            self._files[path] = file
            file.users += 1
            if len(self._files) > MOST_OPEN_FILES:
                idle = next((name for name, each in self._files.items() if not each.users), None)
                if idle is not None:
                    self._retire(idle)
            return file

    def release(self, file: OpenFile) -> None:
        """End one use of a file."""
        with self._lock:
            file.users -= 1
            if file.retired and not file.users:
                os.close(file.descriptor)

    def replace_by_buffered(self, path: Path, refused: OpenFile) -> OpenFile:
        """Release a file that cannot be read past the page cache after all, and give one that is read through it.

        Other threads may still be reading from the old descriptor.
        """
        with self._lock:
            if self._files.get(path) is refused:
                self._retire(path)
            if path not in self._files:  # else another thread was faster
                self._files[path] = self._open(path, direct=False)
            buffered = self._files[path]
            buffered.users += 1
        self.release(refused)
        return buffered

    def forget(self, path: Path) -> None:
        """Close a file once nobody reads it any more; the next read opens whatever has that name then."""
        with self._lock:
            if path in self._files:
                self._retire(path)

    def close(self) -> None:
        """Forget all files."""
        with self._lock:
            for path in list(self._files):
                self._retire(path)

    def _open(self, path: Path, direct: bool) -> OpenFile:
        file = _open_file(path, direct)
        self._any = True
        self._any_buffered |= not file.direct
        return file

    def _retire(self, path: Path) -> None:
        file = self._files.pop(path)
        file.retired = True
        if not file.users:
            os.close(file.descriptor)


def _open_file(file: Path, direct: bool) -> OpenFile:
    try:
        if direct and hasattr(os, "O_DIRECT"):
            try:
                return OpenFile(os.open(file, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC), True)
            except OSError:
                pass  # tmpfs and some network filesystems refuse the flag
        return OpenFile(os.open(file, os.O_RDONLY | os.O_CLOEXEC), False)
    except OSError as error:
        raise CorruptCheckpointError(f"cannot open {file}: {error.strerror}") from error
