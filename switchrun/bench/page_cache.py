"""Putting files out of the page cache, and looking whether they are out."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

#: Root may write here; it drops every file's pages, so it is done only where asking for the files alone fails.
DROP_CACHES = Path("/proc/sys/vm/drop_caches")

#: So much of each file is looked at.
_LOOK_BYTES = 64 * 1024**2


def drop_page_cache(files: Iterable[Path]) -> bool:
    """Put files out of the page cache.

    Returns:
        Whether they are out now, as far as the first 64 MiB of each tell.
    """
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
    """Count the pages of the start of a file that are in the page cache; 0 where the system does not tell."""
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
