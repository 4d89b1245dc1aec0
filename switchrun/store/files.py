"""Files that are there whole or not at all, and the safetensors file of one expert."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from switchrun.checkpoint.types import ExpertKey
from switchrun.machine.files import open_regular
from switchrun.store.layout import Layout
from switchrun.store.paths import open_stored, opened

PAGE = 4096
#: Experts of this size on are read past the page cache, so their pages are given back once written.
_DROP_BYTES = 4 * 1024**2
_TEMPORARY = re.compile(r"\.[0-9]+-[0-9a-f]{8}\.tmp", re.ASCII)
#: Where a filesystem has no locks: how old a temporary file must be to be nobody's.
_ABANDONED_SECONDS = 15 * 60
#: XXH3 is as fast as memory; it finds accidents, and is no protection against a forger.
_CHECKSUM = "xxh3_64"
_CHECKSUM_DIGITS = 16
#: How `open_regular` refuses what is no file, but can be deleted as one; the second is a link's, if put there just now.
NO_FILE = (errno.EINVAL, errno.ELOOP)


class DamagedFileError(Exception):
    """An expert's file is not what this store wrote; its text says in what way."""


@dataclass(frozen=True, slots=True)
class StoredExpert:
    """Where an expert's data lies; its offset is a multiple of 4096.

    The checksum is what the file states, XXH3 (64 bit) of the data; None if its header has not been read.
    """

    path: Path
    offset: int
    nbytes: int
    checksum: int | None


class ExpertFormat:
    """Makes and checks the headers of one store's experts, all of one length: a multiple of 4096.

    A header names its store (by its manifest's identity) and its expert, so that a file of another model, or one that
    was copied to another's place, is recognised without reading its data.
    """

    def __init__(self, layout: Layout, identity: str) -> None:
        self.layout = layout
        self._identity = identity
        self._tensors = {
            part.name: {
                "dtype": part.dtype,
                "shape": list(part.shape),
                "data_offsets": [part.offset, part.offset + part.nbytes],
            }
            for part in layout.tensors
        }
        longest = 8 + len(self._text(ExpertKey("encoder", 10**9, 10**9), 0))
        self.header_bytes = -(-longest // PAGE) * PAGE

    @property
    def file_bytes(self) -> int:
        """Length of every file."""
        return self.header_bytes + self.layout.nbytes

    def header(self, key: ExpertKey, checksum: int) -> bytes:
        """Return all that comes before the data; spaces fill it up, which the format allows."""
        length = self.header_bytes - 8
        return length.to_bytes(8, "little") + self._text(key, checksum).ljust(length)

    def _text(self, key: ExpertKey, checksum: int) -> bytes:
        name = f"{key.stack}.{key.block}/{key.expert}"
        # The checksum has a fixed length and comes first, so `inspect` knows its place.
        about = {_CHECKSUM: f"{checksum:0{_CHECKSUM_DIGITS}x}", "expert": name, "store": self._identity}
        return json.dumps({"__metadata__": about, **self._tensors}, separators=(",", ":")).encode()

    def inspect(self, path: Path, key: ExpertKey, touch: bool = False) -> StoredExpert:
        """Read and check an expert's header; with `touch`, note in the file's times that it is used now.

        Raises:
            DamagedFileError: It is not this expert's, no regular file, or has another length than it must have.
            OSError: The file cannot be read, or is not there.
        """
        try:
            file = open_stored(path)
        except OSError as error:
            if error.errno in NO_FILE:
                raise DamagedFileError(error.strerror) from error
            raise
        try:
            if touch:
                with contextlib.suppress(OSError):
                    os.utime(file)
            # The data is read past the page cache: reading ahead into it would read it twice.
            with contextlib.suppress(OSError):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
            size = os.fstat(file).st_size
            got = os.pread(file, self.header_bytes, 0)
        finally:
            os.close(file)
        begin = 8 + len(f'{{"__metadata__":{{"{_CHECKSUM}":"')
        try:
            checksum = int(got[begin : begin + _CHECKSUM_DIGITS], 16)
        except ValueError:
            checksum = -1
        if checksum < 0 or got != self.header(key, checksum):
            raise DamagedFileError("its header is not that of this expert")
        if size != self.file_bytes:
            raise DamagedFileError(f"it has {size} bytes instead of {self.file_bytes}")
        return StoredExpert(path, self.header_bytes, self.layout.nbytes, checksum)


def write_atomically(store: Path, target: Path, chunks: Sequence[bytes | memoryview]) -> None:
    """Write or replace a file, whole or not at all, whatever happens to the process or the machine.

    The temporary file lies in the store's folder and not beside the target, so that one listing finds what killed
    processes left, not one for each of sixty layers. If this raises OSError, nothing is left behind.
    """
    with opened(store) as folder, opened(store, *target.relative_to(store).parts[:-1]) as block:
        temporary, file = _create_temporary(folder)
        try:
            try:
                size = _write_all(file, chunks)
                os.fsync(file)
                if size >= _DROP_BYTES:
                    with contextlib.suppress(OSError):
                        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.replace(temporary, target.name, src_dir_fd=folder, dst_dir_fd=block)
            finally:
                os.close(file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise
        _sync_folder(block)


def _create_temporary(folder: int) -> tuple[str, int]:
    """Create a file and lock it until it is closed, by death too: so `remove_leftovers` knows that it has an owner."""
    while True:
        name = f".{os.getpid()}-{secrets.token_hex(4)}.tmp"
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        # Another process that begins just now may have taken it for a dead one's before it was locked.
        if os.fstat(file).st_nlink:
            return name, file
        os.close(file)


def _write_all(file: int, chunks: Sequence[bytes | memoryview]) -> int:
    position = 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        written = 0
        while written < len(view):
            written += os.pwrite(file, view[written:], position + written)
        position += written
    return position


def _sync_folder(folder: int) -> None:
    try:
        os.fsync(folder)
    except OSError as error:
        # Some filesystems cannot sync a folder. The file itself is safe, and losing its name loses only time.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise


def temporaries(folder: int) -> list[str]:
    """Return the names of the temporary files in a store's folder, whoever's they are."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        files = [each.name for each in entries if each.is_file(follow_symlinks=False)]
        return list(filter(_TEMPORARY.fullmatch, files))
    return []


def remove_leftovers(store: Path) -> None:
    """Delete the temporary files of processes that were killed; those being written now stay.

    Process ids would not do: a store may be shared by containers, which do not see each other's.
    """
    with contextlib.suppress(OSError), opened(store) as folder:
        for name in temporaries(folder):
            with contextlib.suppress(OSError):
                file = open_regular(name, os.O_NOFOLLOW, dir_fd=folder)
                try:
                    if _abandoned(file):
                        os.unlink(name, dir_fd=folder)
                finally:
                    os.close(file)


def _abandoned(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - os.fstat(file).st_mtime > _ABANDONED_SECONDS
    return True
