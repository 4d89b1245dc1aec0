"""Byte ranges, read straight into buffers by a few threads: what every reader does, and files of this machine."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from switchrun.checkpoint.types import RemoteFile
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.buffers import touch
from switchrun.machine.files import open_regular
from switchrun.store import open_stored
from switchrun.units import MIB

PAGE = 4096
#: Files kept open though nobody reads them at the moment: packed experts are a file each.
MOST_OPEN_FILES = 64


#: Called when reads have ended, with their first error.
Done = Callable[[BaseException | None], None]


@dataclass(frozen=True, slots=True)
class Way:
    """A way to read: so many threads, pieces of so many bytes, past the page cache or through it.

    Reads are cut into pieces, so that the threads work on one expert side by side.
    """

    threads: int = 4
    chunk_bytes: int = 4 * MIB
    direct: bool = True


@dataclass(frozen=True, slots=True)
class Segment:
    """One read: `length` bytes of `file` from `offset` on go to byte `position` of a buffer.

    `needed` bytes of it must be there; the rest is alignment, which may lie beyond the file's end. A file that is
    `stored` is one of the offload folder, where no link is followed.
    """

    file: Path | RemoteFile
    offset: int
    length: int
    position: int
    needed: int
    stored: bool = False


class Reader(ABC):
    """Reads segments into memory."""

    @abstractmethod
    def submit(self, segments: Sequence[Segment], buffer: memoryview, done: Done, new: bool = False) -> int:
        """Start reading segments into a buffer; return the bytes that will be read.

        The buffer must stay untouched until `done` is called: once, on a reader thread, with None or the first error,
        unless `close` drops it. If it is `new` and may have no pages yet, they are touched before it is read to.
        """

    @abstractmethod
    def segment(self, file: Path | RemoteFile, offset: int, nbytes: int) -> Segment:
        """Return the read that brings a byte range to a buffer's start, or near it if whole pages must be read."""

    @abstractmethod
    def wait(self) -> None:
        """Block until every `done` of what was submitted has been called."""

    @abstractmethod
    def close(self, drop: bool = False) -> None:
        """Wait for reads in flight, end the threads and close the files.

        `drop` leaves unread what has not begun, and its `done` uncalled, so `wait` must not be called any more.
        """

    @property
    def reads_past_page_cache(self) -> bool:
        """Whether all files opened so far are really read past the page cache."""
        return False

    def begin(self, segments: Sequence[Segment], buffer: memoryview, new: bool = False) -> Future[None]:
        """Start reading as `submit` does; the future ends with the reads, or with their first error."""
        end: Future[None] = Future()
        self.submit(segments, buffer, partial(_settle, end), new)
        return end

    def read(self, segments: Sequence[Segment], buffer: memoryview) -> None:
        """Read segments into a buffer; blocks until they are there."""
        self.begin(segments, buffer).result()

    def abandon(self) -> None:
        """Wait until nothing is being read any more; what takes long is broken off."""
        self.wait()

    def forget(self, path: Path | RemoteFile) -> None:  # noqa: B027 - who keeps no files open has none to forget
        """Close a file once nobody reads it any more; the next read opens whatever has that name then."""


class PooledReader(Reader):
    """Cuts segments into pieces, and reads those on threads of its own, side by side."""

    def __init__(self, threads: int, name: str) -> None:
        self._outstanding = 0
        #: Pieces that are being read, and those that wait for a thread.
        self.pieces = 0
        self._idle = threading.Condition()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    @abstractmethod
    def _piece_bytes(self, nbytes: int) -> int:
        """Into pieces of what size a segment of so many bytes is cut."""

    @abstractmethod
    def _read_piece(self, piece: Segment, target: memoryview) -> None:
        """Read one piece; blocks."""

    def submit(self, segments: Sequence[Segment], buffer: memoryview, done: Done, new: bool = False) -> int:
        """See `Reader.submit`."""
        pieces = [piece for segment in segments for piece in _cut(segment, self._piece_bytes(segment.needed))]
        pending = _Pending(len(pieces), partial(self._end, done))
        submitted = 0
        with self._idle:
            self._outstanding += 1
            self.pieces += len(pieces)
        try:
            for piece in pieces:
                self._pool.submit(self._read, piece, buffer, new, pending)
                submitted += 1
        except BaseException as error:
            for _ in pieces[submitted:]:
                self._finish(pending, error)
            raise
        return sum(piece.length for piece in pieces)

    def wait(self) -> None:
        """See `Reader.wait`."""
        with self._idle:
            self._idle.wait_for(lambda: self._outstanding == 0)

    def _end(self, done: Done, error: BaseException | None) -> None:
        try:
            done(error)
        finally:
            with self._idle:
                self._outstanding -= 1
                self._idle.notify_all()

    def _read(self, piece: Segment, buffer: memoryview, new: bool, pending: _Pending) -> None:
        try:
            if not pending.failed:
                target = buffer[piece.position : piece.position + piece.length]
                if new:
                    touch(target)
                self._read_piece(piece, target)
        except BaseException as error:  # handed to the thread that waits for the expert
            self._finish(pending, error)
        else:
            self._finish(pending, None)

    def _finish(self, pending: _Pending, error: BaseException | None) -> None:
        with self._idle:
            self.pieces -= 1
        pending.finish(error)

    def close(self, drop: bool = False) -> None:
        """See `Reader.close`."""
        self._pool.shutdown(wait=True, cancel_futures=drop)


class FileReader(PooledReader):
    """Reads files of this machine; owns its threads and file descriptors until `close`.

    `direct` leaves nothing in the page cache; then offsets, lengths and positions must be multiples of 4096. Where the
    filesystem refuses `O_DIRECT`, or the way does without it, pages are given back after each read. What cannot be read
    is a `CorruptCheckpointError`.
    """

    def __init__(self, direct: bool, way: Way | None = None) -> None:
        self._direct = direct
        self._way = way or Way()
        self._files = OpenFiles()
        super().__init__(self._way.threads, "switchrun-reader")

    def _piece_bytes(self, nbytes: int) -> int:  # noqa: ARG002 - however long it is
        return self._way.chunk_bytes

    @property
    def reads_past_page_cache(self) -> bool:
        """Whether all files opened so far are really read past the page cache."""
        return self._files.all_direct

    def segment(self, file: Path | RemoteFile, offset: int, nbytes: int) -> Segment:
        """See `Reader.segment`."""
        if not self._direct:
            return Segment(file, offset, nbytes, 0, nbytes)
        start = offset - offset % PAGE
        needed = offset + nbytes - start
        return Segment(file, start, -(-needed // PAGE) * PAGE, 0, needed)

    def _read_piece(self, piece: Segment, target: memoryview) -> None:
        assert isinstance(piece.file, Path)
        file = self._files.acquire(piece.file, self._direct and self._way.direct, piece.stored)
        got = 0
        try:
            while got < piece.needed:
                try:
                    count = os.preadv(file.descriptor, [target[got:]], piece.offset + got)
                except OSError as error:
                    if file.direct and error.errno == errno.EINVAL:
                        # Some filesystems take the flag and refuse the read; others may still try with the old file.
                        refused, file = file, self._files.acquire(piece.file, direct=False, stored=piece.stored)
                        self._files.release(refused)
                        continue
                    raise CorruptCheckpointError(f"cannot read {piece.file}: {error.strerror}") from error
                got += count
                # A direct read that stops within a page has met the file's end; one that went on there would fail.
                if count == 0 or (file.direct and got < piece.needed and got % PAGE):
                    raise CorruptCheckpointError(
                        f"{piece.file} ends at byte {piece.offset + got}, inside a tensor", "the file was truncated"
                    )
            if self._direct and not file.direct:
                with contextlib.suppress(OSError):
                    os.posix_fadvise(file.descriptor, piece.offset, piece.length, os.POSIX_FADV_DONTNEED)
        finally:
            self._files.release(file)

    def forget(self, path: Path | RemoteFile) -> None:
        """See `Reader.forget`."""
        if isinstance(path, Path):
            self._files.forget(path)

    def close(self, drop: bool = False) -> None:
        """See `Reader.close`."""
        super().close(drop)
        self._files.close()


def _settle(end: Future[None], error: BaseException | None) -> None:
    if error is None:
        end.set_result(None)
    else:
        end.set_exception(error)


class _Pending:
    """Counts down the pieces of one submission."""

    def __init__(self, pieces: int, done: Done) -> None:
        self._left = pieces
        self._done = done
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    @property
    def failed(self) -> bool:
        return self._error is not None

    def finish(self, error: BaseException | None) -> None:
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            last = self._left == 0
        if last:
            self._done(self._error)


def _cut(segment: Segment, chunk: int) -> Iterator[Segment]:
    for start in range(0, segment.needed, chunk):
        length, needed = min(chunk, segment.length - start), min(chunk, segment.needed - start)
        offset, position = segment.offset + start, segment.position + start
        yield Segment(segment.file, offset, length, position, needed, segment.stored)


@dataclass(slots=True, eq=False)
class OpenFile:
    """A descriptor and how many reads use it; one that is retired is closed by the last of them."""

    descriptor: int
    direct: bool
    users: int = 0
    retired: bool = False


class OpenFiles:
    """The files that a reader has open, by path; those used longest ago are closed first. For any thread."""

    def __init__(self) -> None:
        #: The one used last is the last.
        self._files: dict[Path, OpenFile] = {}
        self._lock = threading.Lock()
        self._opened: set[bool] = set()

    @property
    def all_direct(self) -> bool:
        """Whether there were files, and all of them are read past the page cache."""
        return self._opened == {True}

    def acquire(self, path: Path, direct: bool, stored: bool = False) -> OpenFile:
        """Return a file, opened if need be, past the page cache if `direct` and possible; the caller releases it."""
        with self._lock:
            file = self._files.pop(path, None)
            if file is not None and file.direct and not direct:
                self._retire(file)
                file = None
            if file is None:
                file = _open_file(path, direct, stored)
                self._opened.add(file.direct)
            self._files[path] = file
            file.users += 1
            if len(self._files) > MOST_OPEN_FILES:
                idle = next((name for name, each in self._files.items() if not each.users), None)
                if idle is not None:
                    self._retire(self._files.pop(idle))
            return file

    def release(self, file: OpenFile) -> None:
        """End one use of a file."""
        with self._lock:
            file.users -= 1
            if file.retired and not file.users:
                os.close(file.descriptor)

    def forget(self, path: Path) -> None:
        """Close a file once nobody reads it any more; the next read opens whatever has that name then."""
        with self._lock:
            if path in self._files:
                self._retire(self._files.pop(path))

    def close(self) -> None:
        """Forget all files."""
        for path in list(self._files):
            self.forget(path)

    def _retire(self, file: OpenFile) -> None:
        file.retired = True
        if not file.users:
            os.close(file.descriptor)


def _open_file(file: Path, direct: bool, stored: bool) -> OpenFile:
    opener = open_stored if stored else open_regular
    try:
        if direct and hasattr(os, "O_DIRECT"):
            try:
                return OpenFile(opener(file, os.O_DIRECT), True)
            except OSError:
                pass  # tmpfs and some network filesystems refuse the flag
        descriptor = opener(file)
        with contextlib.suppress(OSError, AttributeError):
            # Experts lie here and there: what the system would read ahead of them is not used.
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        return OpenFile(descriptor, False)
    except OSError as error:
        raise CorruptCheckpointError(f"cannot open {file}: {error.strerror}") from error


class SplitReader(Reader):
    """Reads files of this machine by one reader and those of the Hub by another, so that neither waits for the other.

    Owns both. All segments of a submission lie in the same place.
    """

    def __init__(self, local: FileReader, hub: Reader) -> None:
        self._local = local
        self._hub = hub

    def _of(self, file: Path | RemoteFile) -> Reader:
        return self._hub if isinstance(file, RemoteFile) else self._local

    @property
    def reads_past_page_cache(self) -> bool:
        """Of the files of this machine."""
        return self._local.reads_past_page_cache

    def submit(self, segments: Sequence[Segment], buffer: memoryview, done: Done, new: bool = False) -> int:
        """See `Reader.submit`."""
        return self._of(segments[0].file).submit(segments, buffer, done, new)

    def segment(self, file: Path | RemoteFile, offset: int, nbytes: int) -> Segment:
        """See `Reader.segment`."""
        return self._of(file).segment(file, offset, nbytes)

    def wait(self) -> None:
        """See `Reader.wait`."""
        self._hub.wait()
        self._local.wait()

    def abandon(self) -> None:
        """See `Reader.abandon`."""
        self._hub.abandon()
        self._local.abandon()

    def forget(self, path: Path | RemoteFile) -> None:
        """See `Reader.forget`."""
        self._of(path).forget(path)

    def close(self, drop: bool = False) -> None:
        """See `Reader.close`."""
        self._hub.close(drop)
        self._local.close(drop)
