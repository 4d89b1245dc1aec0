"""The dense weights of a model of the Hub, kept in one safetensors file that a stopped process can go on with."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from xxhash import xxh3_64

from switchrun.checkpoint.types import SwitchCheckpoint, TensorSlice
from switchrun.errors import StorageError
from switchrun.machine.files import open_regular, read_regular
from switchrun.store.layout import Layout
from switchrun.store.manifest import Manifest, check_manifest, has_manifest
from switchrun.store.paths import DENSE_FILE, DENSE_FOLDER, clear_hint, model_name, opened, store_folder
from switchrun.units import format_bytes

#: What is fetched until it is all there, and a line for each tensor of it: its number, and XXH3 of its bytes.
PARTIAL_FILE, JOURNAL = "dense.partial", "dense.journal"
_PAGE = 4096
_DIGITS = 16
_LINE = re.compile(rb"([0-9]{1,9}) ([0-9a-f]{16})\n", re.ASCII)
_CHUNK_BYTES = 4 * 1024**2
_MOST_JOURNAL_BYTES = 64 * 1024**2


class DenseFile:
    """One model's dense weights in an offload folder.

    The header, which a first look at the file reads, has a checksum for each tensor; the bytes are verified by whoever
    reads them. A file that is not there whole is made in `writing`, by one process at a time.

    Raises:
        CorruptCheckpointError: The folder belongs to another state of the model; its hint is the command to empty it.
    """

    def __init__(self, offload: str | Path, checkpoint: SwitchCheckpoint) -> None:
        model = model_name(checkpoint)
        self.tensors: Mapping[str, TensorSlice] = _in_order(checkpoint.dense)
        self.layout = Layout.of((name, each.dtype, _as_it_lies(each)) for name, each in self.tensors.items())
        self.folder = store_folder(offload, model, DENSE_FOLDER)
        self._manifest = Manifest(model, checkpoint.fingerprint, DENSE_FOLDER, self.layout)
        check_manifest(self.folder, self._manifest, [self.layout], clear_hint(offload, model, DENSE_FOLDER))
        self._header_bytes = -(-(8 + len(self._text({}))) // _PAGE) * _PAGE

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / DENSE_FILE

    @property
    def file_bytes(self) -> int:
        """What it takes on disk."""
        return self._header_bytes + self.layout.nbytes

    def offset(self, name: str) -> int:
        """Return where a tensor begins in the file."""
        return self._header_bytes + self.layout[name].offset

    def slices(self) -> dict[str, TensorSlice] | None:
        """Return where the tensors lie in the file; None if it is not there whole, or not this model's."""
        with contextlib.suppress(OSError), opened(self.folder) as folder:
            file = open_regular(DENSE_FILE, os.O_NOFOLLOW, dir_fd=folder)
            try:
                size, got = os.fstat(file).st_size, os.pread(file, self._header_bytes, 0)
            finally:
                os.close(file)
            digits = re.findall(rb"[0-9a-f]{16}", got[: 2 * _DIGITS * len(self.tensors) + _PAGE])
            checksums = dict(zip(self.tensors, (int(each, 16) for each in digits), strict=False))
            if size == self.file_bytes and got == self._header(checksums):
                return {
                    name: replace(
                        each, file=self.path, offset=self.offset(name), header_bytes=0, crc=None, xxh3=checksums[name]
                    )
                    for name, each in self.tensors.items()
                }
        return None

    def _header(self, checksums: Mapping[str, int]) -> bytes:
        length = self._header_bytes - 8
        return length.to_bytes(8, "little") + self._text(checksums).ljust(length)

    def _text(self, checksums: Mapping[str, int]) -> bytes:
        # Of a fixed length, and first: so `slices` knows their place.
        digits = " ".join(f"{checksums.get(name, 0):0{_DIGITS}x}" for name in self.tensors)
        header: dict[str, object] = {"__metadata__": {"xxh3_64": digits, "store": self._manifest.identity}}
        for part in self.layout.tensors:
            header[part.name] = {
                "dtype": part.dtype,
                "shape": list(part.shape),
                "data_offsets": [part.offset, part.offset + part.nbytes],
            }
        return json.dumps(header, separators=(",", ":")).encode()

    @contextmanager
    def writing(self) -> Iterator[DenseWriter | None]:
        """Yield what writes the file, or None while another process does.

        Raises:
            StorageError: The folder cannot be written.
        """
        try:
            with opened(self.folder, make=True):
                pass
            if not has_manifest(self.folder):
                self._manifest.write(self.folder)
            with opened(self.folder) as folder:
                if not _lock(folder):
                    yield None
                    return
                with DenseWriter(self, folder) as writer:
                    yield writer
        except OSError as error:
            raise StorageError(
                f"{self.folder} cannot be written: {error.strerror or error}",
                "make room, or name another folder with --offload-folder",
            ) from error


def remove_dense(path: Path) -> None:
    """Delete a `DenseFile` that is damaged."""
    with contextlib.suppress(OSError), opened(path.parent) as folder:
        os.unlink(path.name, dir_fd=folder)


class DenseWriter:
    """Writes the tensors of a `DenseFile`, in any order and from any thread; `missing` are those still to come."""

    def __init__(self, file: DenseFile, folder: int) -> None:
        self._file = file
        self._folder = folder
        self._names = list(file.tensors)
        self._lock = threading.Lock()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._partial = os.open(PARTIAL_FILE, flags, 0o666, dir_fd=folder)
        try:
            os.ftruncate(self._partial, file.file_bytes)
            self._done = self._sound()
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            self._journal = os.open(JOURNAL, flags, 0o666, dir_fd=folder)
        except BaseException:
            os.close(self._partial)
            raise
        for name, checksum in self._done.items():
            self._note(name, checksum)

    def _sound(self) -> dict[str, int]:
        """Return the checksums of tensors that the journal names and whose bytes have them."""
        try:
            lines = read_regular(JOURNAL, _MOST_JOURNAL_BYTES, os.O_NOFOLLOW, dir_fd=self._folder)
        except FileNotFoundError:
            return {}
        sound = {}
        for number, digits in _LINE.findall(lines):
            if int(number) < len(self._names):
                name = self._names[int(number)]
                if self.checksum(name) == int(digits, 16):
                    sound[name] = int(digits, 16)
        return sound

    def _note(self, name: str, checksum: int) -> None:
        os.write(self._journal, b"%d %016x\n" % (self._names.index(name), checksum))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self._file.tensors.values())

    def check_room(self, nbytes: int) -> None:
        """Raise StorageError unless the disk has room for so many bytes."""
        room = os.fstatvfs(self._folder)
        free = room.f_bavail * room.f_frsize
        if nbytes > free:
            raise StorageError(
                f"{self._file.folder}: dense weights need another {format_bytes(nbytes)} there, "
                f"{format_bytes(free)} are free",
                "make room, or name another folder with --offload-folder",
            )

    @property
    def missing(self) -> dict[str, TensorSlice]:
        """What is still to be written."""
        return {name: each for name, each in self._file.tensors.items() if name not in self._done}

    def write(self, name: str, position: int, data: memoryview) -> None:
        """Write bytes of a tensor from `position` on; OSError if that fails."""
        at = self._file.offset(name) + position
        while data:
            count = os.pwrite(self._partial, data, at)
            data, at = data[count:], at + count

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield what was written of a tensor."""
        at = self._file.offset(name)
        end = at + self._file.layout[name].nbytes
        while at < end:
            chunk = os.pread(self._partial, min(_CHUNK_BYTES, end - at), at)
            if not chunk:
                return
            yield chunk
            at += len(chunk)

    def checksum(self, name: str) -> int:
        """Return XXH3 of what was written of a tensor."""
        checksum = xxh3_64()
        for chunk in self.chunks(name):
            checksum.update(chunk)
        return checksum.intdigest()

    def finish(self, name: str) -> None:
        """Note that all of a tensor has been written: whoever goes on later will not ask for it again."""
        checksum = self.checksum(name)
        with self._lock:
            self._done[name] = checksum
            self._note(name, checksum)

    def complete(self) -> None:
        """Give the file its name, once every tensor is there."""
        header = self._file._header(self._done)
        os.pwrite(self._partial, header, 0)
        os.fsync(self._partial)
        os.replace(PARTIAL_FILE, DENSE_FILE, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        os.unlink(JOURNAL, dir_fd=self._folder)
        with contextlib.suppress(OSError):
            os.posix_fadvise(self._partial, 0, 0, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> DenseWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._partial)
        os.close(self._journal)


def _in_order(dense: Mapping[str, TensorSlice]) -> dict[str, TensorSlice]:
    """Return tensors in an order that only names decide: the file is the same whichever way the model is stored."""
    return dict(sorted(dense.items()))


def _as_it_lies(tensor: TensorSlice) -> tuple[int, ...]:
    return tensor.shape[::-1] if tensor.transposed else tensor.shape


def _lock(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # A filesystem without locks.
    return True
