"""The disk itself: bytes read from it, files put out of the page cache, and a fill's reads without a model. No torch.

Only the very same byte ranges in the same order show what the disk could have given: bandwidth depends on sizes, order,
what was read before, and the minute.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

from switchrun.experts.reader import PAGE, Segment, Way
from switchrun.experts.ways import WAYS
from switchrun.machine.files import system_lines
from switchrun.units import MIB

#: Root may write here; it drops every file's pages, so it is done only where asking for the files alone fails.
DROP_CACHES = Path("/proc/sys/vm/drop_caches")

#: So much of each file is looked at.
_LOOK_BYTES = 64 * MIB
#: More than the processor's caches hold, so that the bytes go to memory as they do in a fill.
_BUFFER_BYTES = 128 * MIB


def drop_page_cache(files: Iterable[Path]) -> bool:
    """Put files out of the page cache; return whether they are out, as far as the first 64 MiB of each show."""
    files = sorted(set(files))
    for file in files:
        with open(file, "rb", buffering=0) as stream, contextlib.suppress(OSError):
            os.fsync(stream.fileno())  # pages that are not yet written stay
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not any(map(cached_pages, files)):
        return True
    with contextlib.suppress(OSError):
        DROP_CACHES.write_text("1\n")
    return not any(map(cached_pages, files))


def cached_pages(file: Path) -> int:
    """Count the pages of the start of a file that are in the page cache; 0 where the system does not say."""
    length = min(file.stat().st_size, _LOOK_BYTES)
    if length == 0:
        return 0
    pages = -(-length // mmap.PAGESIZE)
    states = (ctypes.c_ubyte * pages)()
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_COPY) as view:
        start = ctypes.c_char.from_buffer(view)
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(length), states)
        del start  # a mapping that something points into cannot be closed
    return 0 if failed else sum(state & 1 for state in states)


def io_read_bytes() -> int | None:
    """Return the bytes that this process made the system read from disks so far; None where it is not counted."""
    for line in system_lines(Path("/proc/self/io")):
        name, _, count = line.partition(": ")
        if name == "read_bytes" and count.isdecimal():
            return int(count)
    return None


def replay_all(reads: Mapping[Any, Sequence[Segment]]) -> list[dict[str, Any]]:
    """Replay the reads of each stack in every way of reading, and return the bandwidths by way and stack."""
    memory = mmap.mmap(-1, _BUFFER_BYTES)
    memory.write(bytes(_BUFFER_BYTES))  # new pages are slower than many disks
    with memoryview(memory) as buffer:
        return [asdict(way) | {stack: replay(reads[stack], way, buffer) for stack in reads} for way in WAYS]


def replay(reads: Sequence[Segment], way: Way, buffer: memoryview) -> float | None:
    """Do reads in order, into touched memory that is used again and again, and return bytes per second.

    Those from the Hub are left out. None if there is nothing to read, or the filesystem refuses this way.
    """
    ranges = [(each.file, each.offset, each.length) for each in reads if isinstance(each.file, Path)]
    files = {file for file, _, _ in ranges}
    if not files:
        return None
    if not way.direct:
        drop_page_cache(files)
    flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if way.direct else 0)
    descriptors: dict[Path, int] = {}

    def read(numbered: tuple[int, tuple[Path, int, int]]) -> None:
        number, (file, offset, length) = numbered
        start = number % (len(buffer) // way.chunk_bytes) * way.chunk_bytes
        os.preadv(descriptors[file], [buffer[start : start + length]], offset)

    try:
        for file in files:
            descriptors[file] = os.open(file, flags)
        with ThreadPoolExecutor(way.threads) as pool:
            start = perf_counter()
            for _ in pool.map(read, enumerate(_pieces(ranges, way.chunk_bytes))):
                pass
            return sum(length for _, _, length in ranges) / (perf_counter() - start)
    except OSError:
        return None  # tmpfs and some network filesystems refuse O_DIRECT
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
        if not way.direct:
            drop_page_cache(files)


def _pieces(ranges: Iterable[tuple[Path, int, int]], chunk: int) -> Iterator[tuple[Path, int, int]]:
    """Cut ranges into page-aligned pieces of at most `chunk` bytes: file, offset, length."""
    for file, offset, length in ranges:
        begin, end = offset & -PAGE, -(-(offset + length) // PAGE) * PAGE
        for start in range(begin, end, chunk):
            yield file, start, min(chunk, end - start)
