"""Byte ranges of files, read straight into buffers by a few threads."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from switchrun.checkpoint.types import ExpertSlices, TensorSlice
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.buffers import touch
from switchrun.experts.open_files import OpenFiles
from switchrun.machine import disks
from switchrun.units import MIB

PAGE = 4096


@dataclass(frozen=True, slots=True)
class Way:
    """A way to read: so many threads, pieces of so many bytes, past the page cache or through it.

    Reads are cut into pieces, so that the threads work on one expert side by side.
    """

    threads: int
    chunk_bytes: int
    direct: bool


#: One of them was the best on every disk that was tried; the first is taken until another has shown that it is better.
WAYS = (
    Way(4, 4 * MIB, True),
    Way(1, 32 * MIB, True),
    Way(2, 16 * MIB, True),
    Way(8, 2 * MIB, True),
    Way(4, 4 * MIB, False),
)


@dataclass(frozen=True, slots=True)
class Segment:
    """One read: `length` bytes of `file` from `offset` on go to byte `position` of a buffer.

    `needed` bytes of it must be there; the rest is alignment, which may lie beyond the file's end.
    """

    file: Path
    offset: int
    length: int
    position: int
    needed: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Which reads bring an expert into a buffer, and at which byte of it each of its `ranges` then begins."""

    segments: tuple[Segment, ...]
    positions: tuple[int, ...]


class FileReader:
    """Reads segments into memory on its own threads, past the page cache where the filesystem lets it.

    Args:
        direct: Leave nothing in the page cache; then offsets, lengths and positions must be multiples of 4096. Where
            the filesystem refuses `O_DIRECT`, or the way does without it, pages are given back after each read.
        way: How to read.

    The reader owns its threads and file descriptors until `close`.
    """

    def __init__(self, direct: bool, way: Way = WAYS[0]) -> None:
        self._direct = direct
        self._way = way
        self._files = OpenFiles()
        self._outstanding = 0
        self._idle = threading.Condition()
        self._pool = ThreadPoolExecutor(way.threads, thread_name_prefix="switchrun-reader")

    @property
    def reads_past_page_cache(self) -> bool:
        """Whether all files opened so far are really read past the page cache."""
        return self._files.all_direct

    def submit(
        self,
        segments: Iterable[Segment],
        buffer: memoryview,
        done: Callable[[BaseException | None], None],
        new: bool = False,
    ) -> int:
        """Start reading segments into a buffer.

        Args:
            segments: What to read.
            buffer: Writable bytes; must stay untouched until `done` is called.
            done: Called once, on a reader thread, with None or the first error; unless `close` drops it.
            new: The buffer may have no pages yet; they are touched before it is read to.

        Returns:
            The bytes that will be read.
        """
        pieces = [piece for segment in segments for piece in _cut(segment, self._way.chunk_bytes)]
        pending = _Pending(len(pieces), partial(self._end, done))
        submitted = 0
        with self._idle:
            self._outstanding += 1
        try:
            for piece in pieces:
                self._pool.submit(self._read, piece, buffer, new, pending)
                submitted += 1
        except BaseException as error:
            for _ in pieces[submitted:]:
                pending.finish(error)
            raise
        return sum(piece.length for piece in pieces)

    def segment(self, file: Path, offset: int, nbytes: int) -> Segment:
        """Give the read that brings a byte range to the start of a buffer, or near it if whole pages must be read."""
        if not self._direct:
            return Segment(file, offset, nbytes, 0, nbytes)
        start = offset - offset % PAGE
        needed = offset + nbytes - start
        return Segment(file, start, -(-needed // PAGE) * PAGE, 0, needed)

    def read(self, segments: Iterable[Segment], buffer: memoryview) -> None:
        """Read segments into a buffer; blocks until they are there.

        Raises:
            CorruptCheckpointError: They cannot be read.
        """
        end: Future[None] = Future()
        self.submit(segments, buffer, partial(settle, end))
        end.result()

    def wait(self) -> None:
        """Block until everything that was submitted has ended and has been told."""
        with self._idle:
            self._idle.wait_for(lambda: self._outstanding == 0)

    def _end(self, done: Callable[[BaseException | None], None], error: BaseException | None) -> None:
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
            pending.finish(error)
        else:
            pending.finish(None)

    def _read_piece(self, piece: Segment, target: memoryview) -> None:
        file = self._files.acquire(piece.file, self._direct and self._way.direct)
        got = 0
        try:
            while got < piece.needed:
                try:
                    count = os.preadv(file.descriptor, [target[got:]], piece.offset + got)
                except OSError as error:
                    if file.direct and error.errno == errno.EINVAL:
                        # Some filesystems take the flag and refuse the read.
                        file = self._files.replace_by_buffered(piece.file, file)
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

    def forget(self, path: Path) -> None:
        """Close a file once nobody reads it any more; the next read opens whatever has that name then."""
        self._files.forget(path)

    def close(self, drop: bool = False) -> None:
        """Wait for reads in flight, end the threads and close the files.

        Args:
            drop: What has not begun is not read and never told, so `wait` must not be called any more; else it is
                waited for too.
        """
        self._pool.shutdown(wait=True, cancel_futures=drop)
        self._files.close()


def settle(end: Future[None], error: BaseException | None) -> None:
    """End a future as `FileReader.submit` tells it."""
    if error is None:
        end.set_result(None)
    else:
        end.set_exception(error)


class _Pending:
    """Counts down the pieces of one submission."""

    def __init__(self, pieces: int, done: Callable[[BaseException | None], None]) -> None:
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


def known_way(file: Path) -> Way | None:
    """Give the way that was best on the disk where a file lies, if that was tried; see `switchrun.experts.probe`."""
    known = disks.recall("reading", file)
    return next((way for way in WAYS if known == asdict(way)), None)


def _cut(segment: Segment, chunk: int) -> list[Segment]:
    return [
        Segment(
            segment.file,
            segment.offset + start,
            min(chunk, segment.length - start),
            segment.position + start,
            min(chunk, segment.needed - start),
        )
        for start in range(0, segment.needed, chunk)
    ]


def plan_reads(slices: ExpertSlices, direct: bool) -> ReadPlan:
    """Lay out the reads of one expert; tensors that are neighbours in a file share one.

    Args:
        slices: Where the matrices and their scales lie.
        direct: Align everything to pages, for `O_DIRECT`.
    """
    page = PAGE if direct else 64
    groups: list[list[TensorSlice]] = []
    for tensor in sorted(slices.ranges, key=lambda tensor: (str(tensor.file), tensor.offset)):
        last = groups[-1][-1] if groups else tensor
        gap = tensor.offset - (last.offset + last.nbytes)
        # A gap is read along where that is no more than alignment costs anyway.
        if groups and last.file == tensor.file and 0 <= gap <= (PAGE if direct else 0):
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
    segments, begins, cursor = [], {}, 0
    for group in groups:
        begin, end = group[0].offset, group[-1].offset + group[-1].nbytes
        start = begin - begin % PAGE if direct else begin
        length = -(-(end - start) // PAGE) * PAGE if direct else end - start
        segments.append(Segment(group[0].file, start, length, cursor, end - start))
        for tensor in group:
            begins[id(tensor)] = cursor + tensor.offset - start
        cursor = -(-(cursor + length) // page) * page
    return ReadPlan(tuple(segments), tuple(begins[id(tensor)] for tensor in slices.ranges))
