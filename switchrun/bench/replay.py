"""The disk's raw bandwidth: the byte ranges that a fill read, in the same order, read again with no model.

Nothing else tells what the disk could have given: bandwidth depends on sizes, order, what was read before, and the
minute. The buffers are touched before the clock starts, since new pages are slower than many disks.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from switchrun.bench.page_cache import drop_page_cache
from switchrun.experts.buffers import touch
from switchrun.experts.reader import Way
from switchrun.units import MIB

_PAGE = 4096
#: More than the processor's caches hold, so that the bytes go to memory as they do in a fill.
_RING_BYTES = 128 * MIB


@dataclass(frozen=True, slots=True)
class Range:
    """A read of a fill: `length` bytes of a file."""

    file: Path
    offset: int
    length: int


class Ring:
    """Touched memory that replays read into, from its start again when its end is reached."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _RING_BYTES)
        self._view = memoryview(self._memory)
        touch(self._view)

    def close(self) -> None:
        """Give the memory back."""
        self._view.release()
        self._memory.close()

    def place(self, position: int, length: int) -> memoryview:
        """Give a part that begins at a multiple of `length`."""
        start = position % (_RING_BYTES // length) * length
        return self._view[start : start + length]


def replay(ranges: Sequence[Range], way: Way, ring: Ring) -> float | None:
    """Read ranges in order and give the bandwidth; blocks until they are read.

    Returns:
        Bytes per second; None if there is nothing to read or the filesystem refuses this way.
    """
    files = {each.file for each in ranges}
    if not ranges:
        return None
    if not way.direct:
        drop_page_cache(files)
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if way.direct else 0)
    descriptors: dict[Path, int] = {}
    try:
        for file in files:
            descriptors[file] = os.open(file, flags)
        return _replay(ranges, way, ring, descriptors)
    except OSError:
        return None  # tmpfs and some network filesystems refuse O_DIRECT
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
        if not way.direct:
            drop_page_cache(files)


def _replay(ranges: Sequence[Range], way: Way, ring: Ring, descriptors: dict[Path, int]) -> float:
    pieces = enumerate(_pieces(ranges, way.chunk_bytes))
    lock = threading.Lock()
    errors: list[OSError] = []

    def work() -> None:
        while not errors:
            with lock:
                number, piece = next(pieces, (0, None))
            if piece is None:
                return
            try:
                os.preadv(descriptors[piece.file], [ring.place(number, way.chunk_bytes)[: piece.length]], piece.offset)
            except OSError as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(way.threads)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if errors:
        raise errors[0]
    return sum(each.length for each in ranges) / seconds


def _pieces(ranges: Sequence[Range], chunk: int) -> Iterator[Range]:
    """Cut ranges into page-aligned pieces of at most `chunk` bytes."""
    for each in ranges:
        begin, end = each.offset & -_PAGE, -(-(each.offset + each.length) // _PAGE) * _PAGE
        for start in range(begin, end, chunk):
            yield Range(each.file, start, min(chunk, end - start))
