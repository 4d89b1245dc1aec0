"""The dense weights of a model of the Hub, kept in one safetensors file that a stopped process can go on with."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from xxhash import xxh3_64

from switchrun.checkpoint.names import scales_of
from switchrun.checkpoint.types import SwitchCheckpoint, TensorSlice
from switchrun.errors import StorageError
from switchrun.machine.files import open_regular, read_regular
from switchrun.store.files import NO_FILE, DamagedFileError
from switchrun.store.layout import Layout
from switchrun.store.manifest import Manifest, check_manifest, has_manifest
from switchrun.store.paths import DENSE_FILE, DENSE_FOLDER, clear_hint, model_name, opened, store_folder
from switchrun.units import format_bytes

#: What is fetched until it is all there, and a line for each tensor of it: its number, and XXH3 of its bytes.
PARTIAL_FILE, JOURNAL = "dense.partial", "dense.journal"
_PAGE = 4096
_DIGITS = 16
_CHECKSUM = "xxh3_64"
_HEX = re.compile(rb"[0-9a-f]{16}", re.ASCII)
_LINE = re.compile(rb"([0-9]{1,9}) ([0-9a-f]{16})\n", re.ASCII)
_CHUNK_BYTES = 4 * 1024**2
_MOST_JOURNAL_BYTES = 64 * 1024**2


class DenseFormat:
    """Makes and checks the header of one model's file of dense weights: a layout, and a checksum for each part of it.

    A first look at the file reads its header alone, which states the checksums; whoever reads the bytes verifies them.
    """

    def __init__(self, layout: Layout, identity: str) -> None:
        self.layout = layout
        self._identity = identity
        self._places = {part.name: part for part in layout.parts}
        self.header_bytes = -(-(8 + len(self._text({}))) // _PAGE) * _PAGE

    @property
    def file_bytes(self) -> int:
        """Length of the file."""
        return self.header_bytes + self.layout.nbytes

    def offset(self, name: str) -> int:
        """Return where a part begins in the file."""
        return self.header_bytes + self._places[name].offset

    def header(self, checksums: Mapping[str, int]) -> bytes:
        """Return all that comes before the data; spaces fill it up, which the format allows."""
        length = self.header_bytes - 8
        return length.to_bytes(8, "little") + self._text(checksums).ljust(length)

    def _text(self, checksums: Mapping[str, int]) -> bytes:
        # Of a fixed length, and first: so `inspect` knows their place.
        digits = "".join(f"{checksums.get(name, 0):0{_DIGITS}x}" for name in self._places)
        header: dict[str, object] = {"__metadata__": {_CHECKSUM: digits, "store": self._identity}}
        for part in self.layout.tensors:
            header[part.name] = {
                "dtype": part.dtype,
                "shape": list(part.shape),
                "data_offsets": [part.offset, part.offset + part.nbytes],
            }
        return json.dumps(header, separators=(",", ":")).encode()

    def inspect(self, folder: Path) -> dict[str, int]:
        """Return the checksums that a file's header states, by the names of the parts.

        Raises:
            DamagedFileError: It is not this model's, no regular file, or has another length than it must have.
            OSError: The file cannot be read, or is not there.
        """
        with opened(folder) as handle:
            try:
                file = open_regular(DENSE_FILE, os.O_NOFOLLOW, dir_fd=handle)
            except OSError as error:
                if error.errno in NO_FILE:
                    raise DamagedFileError(error.strerror) from error
                raise
        try:
            size, got = os.fstat(file).st_size, os.pread(file, self.header_bytes, 0)
        finally:
            os.close(file)
        begin = 8 + len(f'{{"__metadata__":{{"{_CHECKSUM}":"')
        checksums = {}
        for number, name in enumerate(self._places):
            digits = got[begin + number * _DIGITS : begin + (number + 1) * _DIGITS]
            checksums[name] = int(digits, 16) if _HEX.fullmatch(digits) else 0
        if size != self.file_bytes or got != self.header(checksums):
            raise DamagedFileError("its header is not that of this model's dense weights, or it has another length")
        return checksums

    def chunks(self, file: int, name: str) -> Iterator[bytes]:
        """Yield the bytes of a part of an open file."""
        at = self.offset(name)
        end = at + self._places[name].nbytes
        while at < end:
            chunk = os.pread(file, min(_CHUNK_BYTES, end - at), at)
            if not chunk:
                return
            yield chunk
            at += len(chunk)

    def checksum(self, file: int, name: str) -> int:
        """Return XXH3 of a part of an open file."""
        checksum = xxh3_64()
        for chunk in self.chunks(file, name):
            checksum.update(chunk)
        return checksum.intdigest()


class DenseFile:
    """One model's dense weights in an offload folder. What is not there whole is made in `writing`.

    Raises:
        CorruptCheckpointError: The folder belongs to another state of the model; its hint is the command to empty it.
    """

    def __init__(self, offload: str | Path, checkpoint: SwitchCheckpoint) -> None:
        model = model_name(checkpoint)
        self._dense = checkpoint.dense
        scales = {scales_of(name): part for name, each in checkpoint.dense.items() for part in each.parts}
        # In an order that only names decide: the file is the same whichever way the model is stored.
        self.tensors: Mapping[str, TensorSlice] = dict(sorted({**checkpoint.dense, **scales}.items()))
        layout = Layout.of((name, each.dtype, _as_it_lies(each)) for name, each in self.tensors.items())
        self.folder = store_folder(offload, model, DENSE_FOLDER)
        self._manifest = Manifest(model, checkpoint.fingerprint, DENSE_FOLDER, layout)
        check_manifest(self.folder, self._manifest, clear_hint(offload, model, DENSE_FOLDER))
        self.format = DenseFormat(layout, self._manifest.identity)

    @property
    def file_bytes(self) -> int:
        """What it takes on disk."""
        return self.format.file_bytes

    def slices(self) -> dict[str, TensorSlice] | None:
        """Return where the tensors lie in the file; None if it is not there whole, or not this model's."""
        try:
            checksums = self.format.inspect(self.folder)
        except (DamagedFileError, OSError):
            return None

        def kept(name: str) -> TensorSlice:
            tensor = self.tensors[name]
            return replace(
                tensor,
                file=self.folder / DENSE_FILE,
                offset=self.format.offset(name),
                parts=(kept(scales_of(name)),) if tensor.parts else (),
                header_bytes=0,
                crc=None,
                xxh3=checksums[name],
            )

        return {name: kept(name) for name in self._dense}

    @contextmanager
    def writing(self) -> Iterator[DenseWriter | None]:
        """Yield what writes the file, or None while another process does, or if it is there.

        Raises:
            StorageError: The folder cannot be written.
        """
        try:
            with opened(self.folder, make=True):
                pass
            if not has_manifest(self.folder):
                self._manifest.write(self.folder)
            with opened(self.folder) as folder:
                # Another process may have ended between its caller's look and the lock.
                if not _lock(folder) or self.slices() is not None:
                    yield None
                    return
                with DenseWriter(self, folder) as writer:
                    yield writer
        except FileNotFoundError as error:
            raise StorageError(f"{self.folder} was deleted while it was written", "run it again") from error
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StorageError(
                f"{self.folder} cannot be written: {error.strerror or error}",
                f"{'make room' if full else 'clear it'}, or name another folder with --offload-folder",
            ) from error


def remove_dense(path: Path) -> None:
    """Delete a `DenseFile` that is damaged."""
    with contextlib.suppress(OSError), opened(path.parent) as folder:
        os.unlink(path.name, dir_fd=folder)


class DenseWriter:
    """Writes the tensors of a `DenseFile`, in any order and from any thread; `missing` are those still to come."""

    def __init__(self, file: DenseFile, folder: int) -> None:
        self._file = file
        self._format = file.format
        self._folder = folder
        self._numbers = {name: number for number, name in enumerate(file.tensors)}
        self._lock = threading.Lock()
        flags = os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        for each in (PARTIAL_FILE, JOURNAL, DENSE_FILE):
            _remove_unless_own(each, folder)
        self._partial = os.open(PARTIAL_FILE, flags | os.O_RDWR, 0o666, dir_fd=folder)
        try:
            os.ftruncate(self._partial, file.format.file_bytes)
            self._done = self._sound()
            self._journal = os.open(JOURNAL, flags | os.O_WRONLY | os.O_TRUNC, 0o666, dir_fd=folder)
        except BaseException:
            os.close(self._partial)
            raise
        for name, checksum in self._done.items():
            self._note(name, checksum)

    def _sound(self) -> dict[str, int]:
        """Return the checksums of tensors that the journal names and whose bytes have them."""
        try:
            text = read_regular(JOURNAL, _MOST_JOURNAL_BYTES, os.O_NOFOLLOW, dir_fd=self._folder)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EFBIG):
                raise
            return {}  # What has another size than a journal can have is none.
        names = list(self._numbers)
        lines = [(int(number), int(digits, 16)) for number, digits in _LINE.findall(text)]
        stated = {names[number]: checksum for number, checksum in lines if number < len(names)}
        return {name: stated[name] for name in stated if self._format.checksum(self._partial, name) == stated[name]}

    def _note(self, name: str, checksum: int) -> None:
        os.write(self._journal, b"%d %016x\n" % (self._numbers[name], checksum))

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.nbytes for each in self._file.tensors.values())

    @property
    def missing(self) -> dict[str, TensorSlice]:
        """What is still to be written."""
        return {name: each for name, each in self._file.tensors.items() if name not in self._done}

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

    def write(self, name: str, position: int, data: memoryview) -> None:
        """Write bytes of a tensor from `position` on; OSError if that fails."""
        at = self._format.offset(name) + position
        while data:
            count = os.pwrite(self._partial, data, at)
            data, at = data[count:], at + count

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield what was written of a tensor."""
        return self._format.chunks(self._partial, name)

    def finish(self, name: str) -> None:
        """Note that all of a tensor has been written: whoever goes on later will not ask for it again."""
        checksum = self._format.checksum(self._partial, name)
        with self._lock:
            self._done[name] = checksum
            self._note(name, checksum)

    def complete(self) -> None:
        """Give the file its name, once every tensor is there."""
        os.pwrite(self._partial, self._format.header(self._done), 0)
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


def _as_it_lies(tensor: TensorSlice) -> tuple[int, ...]:
    return tensor.shape[::-1] if tensor.transposed else tensor.shape


def _remove_unless_own(name: str, folder: int) -> None:
    """Delete what is in the place of a file but is a link, a FIFO and the like, or has another name as well."""
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.unlink(name, dir_fd=folder)


def _lock(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # A filesystem without locks.
    return True
