"""What `map` has answered so far, kept beside its output, so that a run that was killed can go on.

The first line names what is answered, and how: the key. Each other line is the record of one input, as `fill --format
jsonl` writes it, with a checksum behind it; in the order in which they were answered. Nothing in it is trusted: a line
that is torn or damaged counts as absent, so its input is answered again.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import stat
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from switchrun.checkpoint.files import parse_json
from switchrun.errors import CorruptCheckpointError, UsageError, printable
from switchrun.output.answer_files import cannot_write, sync_folder
from switchrun.units import MIB

Key = Mapping[str, str | int | float | bool | None]

_VERSION = 1
#: How every journal begins.
_MAGIC = b'{"switchrun_map": '
#: Records hold two texts of at most 1 MiB, of which JSON may make six times as much, and what the model wrote.
_MOST_LINE_BYTES = 64 * MIB
_MOST_HEADER_BYTES = MIB
#: A kill loses nothing that was written. The machine's own end may lose what was answered in so many seconds.
_SYNC_SECONDS = 1.0
_ABSENT = -1
_BEGIN_ANEW = "begin anew with --restart"


class Journal:
    """The journal of one output file, locked for as long as it is open; make one with `open_journal`.

    Attributes:
        begun: Whether there was one.
        key: What it belongs to; None if it has yet to begin.
        answered: How many inputs have a record, those that failed included.
        failed: How many of them failed.
        damaged: Whole lines that cannot be used.
    """

    def __init__(self, path: Path, file: BinaryIO, count: int, restart: bool) -> None:
        self.path = path
        self.begun = False
        self.key: Key | None = None
        self.answered = self.failed = self.damaged = 0
        self._file = file
        #: Where the record of each input is: 8 bytes an input, however long the records are.
        self._offsets = array("q", [_ABSENT]) * count
        self._end = 0
        self._synced_at = time.monotonic()
        self._load(restart)

    def __contains__(self, number: int) -> bool:
        return self._offsets[number] != _ABSENT

    def check_key(self, key: Key) -> None:
        """Raise UsageError if the journal has begun and one of these parts of its key is another."""
        if self.key is None:
            return
        for name, value in key.items():
            found = self.key.get(name)
            if found != value or type(found) is not type(value):
                what = f"{name} is {value}, and was {found}" if name.startswith("--") else f"{name} is another"
                raise UsageError(f"{self.path} belongs to another run: {printable(what, 300)}", _BEGIN_ANEW)

    def begin(self, key: Key) -> None:
        """Forget what was answered, and begin anew."""
        header = json.dumps({"switchrun_map": _VERSION, "key": key}).encode()
        with self._writing():
            os.ftruncate(self._file.fileno(), 0)
            self._end = 0
            self._write(_sealed(header))
            os.fsync(self._file.fileno())
            sync_folder(self.path)
        self.key = key
        self.answered = self.failed = self.damaged = 0
        self._offsets = array("q", [_ABSENT]) * len(self._offsets)

    def append(self, records: Sequence[tuple[int, str, bool]]) -> None:
        """Keep records: the number of the input, the line of JSON, and whether it failed."""
        sealed = [_sealed(line.rstrip("\n").encode()) for _, line, _ in records]
        place = self._end
        with self._writing():
            self._write(b"".join(sealed))
            if time.monotonic() - self._synced_at >= _SYNC_SECONDS:
                self.sync()
        for (number, _, failed), line in zip(records, sealed, strict=True):
            self._offsets[number] = place
            place += len(line)
            self.answered += 1
            self.failed += failed

    def sync(self) -> None:
        """Have the disk keep what was appended."""
        with self._writing():
            os.fsync(self._file.fileno())
        self._synced_at = time.monotonic()

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield the records of all inputs in the inputs' order; all must be there."""
        # The file has been written since it was read: what its own buffer holds is old.
        file = io.BufferedReader(io.FileIO(self._file.fileno(), closefd=False))
        for number, offset in enumerate(self._offsets):
            file.seek(offset)
            record = _record(file.readline(_MOST_LINE_BYTES))
            if record is None or record["id"] != number:
                raise CorruptCheckpointError(f"{self.path}: the record of input {number + 1} is damaged", _BEGIN_ANEW)
            yield record

    def remove(self) -> None:
        """Delete it: its output is complete."""
        with self._writing():
            self.path.unlink()

    def close(self) -> None:
        """Unlock it; an empty one is deleted."""
        with suppress(OSError):
            if not os.fstat(self._file.fileno()).st_size:
                self.path.unlink()
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, restart: bool) -> None:
        """Find the records that are there, and cut off what a kill left half written."""
        size = os.fstat(self._file.fileno()).st_size
        header = self._file.readline(_MOST_HEADER_BYTES)
        if not header.startswith(_MAGIC[: len(header)]):
            raise UsageError(f"{self.path} is in the way, and no journal of map", "move it, or name another OUT")
        if not header.endswith(b"\n"):
            if size > len(header):
                raise self._bad_header("its first line is damaged")
            return  # killed when it began, before anything was answered
        self.begun = True
        if restart:
            return
        self.key = self._read_key(header)
        self._end = len(header)
        while line := self._file.readline(_MOST_LINE_BYTES):
            place, self._end = self._end, self._end + len(line)
            record = _record(line)
            if record is not None and record["id"] < len(self._offsets):
                if record["id"] not in self:
                    self._offsets[record["id"]] = place
                    self.answered += 1
                    self.failed += "error" in record
            elif not line.endswith(b"\n") and self._end == size:
                self._end = place
            else:
                self.damaged += 1
        with self._writing():
            os.ftruncate(self._file.fileno(), self._end)

    def _read_key(self, header: bytes) -> Key:
        content = _opened(header)
        if content is None:
            raise self._bad_header("its first line is damaged")
        version, key = content.get("switchrun_map"), content.get("key")
        if version != _VERSION:
            raise self._bad_header(f"it has format {printable(version, 20)}, this switchrun has format {_VERSION}")
        if not isinstance(key, dict) or not all(isinstance(each, str | int | float | None) for each in key.values()):
            raise self._bad_header("its first line is damaged")
        return key

    def _bad_header(self, what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self.path}: {what}", _BEGIN_ANEW)

    def _write(self, data: bytes) -> None:
        """Write at the end; if that fails, nothing of it stays."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.pwrite(self._file.fileno(), view, self._end + len(data) - len(view)) :]
        except BaseException:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), self._end)
            raise
        self._end += len(data)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.path, error) from error


def open_journal(path: Path, count: int, *, restart: bool = False) -> Journal:
    """Open the journal of an output of `count` inputs, or make one that has yet to begin; with `restart` it always has.

    Raises:
        UsageError: Another process has it open, or another file is in its place.
        CorruptCheckpointError: Its first line is damaged.
        StorageError: The folder cannot be written.
    """
    while True:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            descriptor = os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UsageError(f"{path} is in the way, and a link", "move it, or name another OUT") from error
            raise cannot_write(path, error) from error
        file = open(descriptor, "rb")  # noqa: SIM115 - the journal closes it
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UsageError(f"{path} is in the way, and no journal of map", "move it, or name another OUT")
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(f"another process is at work on {path}", "wait for it, or name another OUT") from error
            except OSError:  # This filesystem has no locks.
                pass
            # Whoever had the lock may have deleted it.
            if not os.fstat(descriptor).st_nlink:
                file.close()
                continue
            return Journal(path, file, count, restart)
        except BaseException:
            file.close()
            raise


def _sealed(line: bytes) -> bytes:
    """Put a checksum behind a line of JSON, in which there is no tab."""
    return b"%s\t%s\n" % (line, xxhash.xxh3_64_hexdigest(line).encode())


def _opened(line: bytes) -> dict[str, Any] | None:
    """Return the object on a line; None if the line is damaged."""
    content, _, checksum = line.removesuffix(b"\n").rpartition(b"\t")
    if not line.endswith(b"\n") or checksum != xxhash.xxh3_64_hexdigest(content).encode():
        return None
    try:
        found = parse_json(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _record(line: bytes) -> dict[str, Any] | None:
    """Return the record on a line, if it has what every output needs of it."""
    record = _opened(line)
    if record is None or type(number := record.get("id")) is not int or number < 0:
        return None
    error = record.get("error")
    needed = (
        record.get("input"),
        *(map(error.get, ("message",)) if isinstance(error, dict) else (record.get("text"),)),
    )
    return record if all(type(each) is str for each in needed) else None
