"""Memory in equal pieces, taken from the system before it is needed. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import threading

#: Buffers of this size on ask for huge pages.
_HUGE_PAGE_BUFFERS = 4 * 1024**2

_LIBC = ctypes.CDLL(None)
_MADV_POPULATE_WRITE = 23
#: Larger steps keep other threads, such as one that imports torch, from mapping memory for too long.
_TOUCH_BYTES = 64 * 1024


class Pages:
    """One mapping of anonymous memory, cut into equal page-aligned buffers.

    Pages are taken from the system when they are first written, by the threads that read into them, or by `touch`.
    The buffers live as long as this object or any tensor made of them.

    Args:
        count: How many buffers.
        size: Size of each.
        memory: Memory of at least that size, if there is some already.

    Attributes:
        memory: The mapping.
        touched: So many buffers, from the first on, have their pages for certain.
    """

    def __init__(self, count: int, size: int, memory: Pages | None = None) -> None:
        self.count = count
        self.size = size
        self.memory: mmap.mmap = memory.memory if memory else _anonymous(count * size, huge=size >= _HUGE_PAGE_BUFFERS)
        self.touched: int = memory.touched if memory else 0
        self._view = memoryview(self.memory)

    def touch(self, index: int) -> bool:
        """Take one buffer's pages from the system; what is in them stays. Other threads run on meanwhile.

        Returns:
            Whether the system knows how (Linux 5.14 and later).
        """
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        first, end = index * self.size // mmap.PAGESIZE * mmap.PAGESIZE, (index + 1) * self.size
        for start in range(first, end, _TOUCH_BYTES):
            length = min(_TOUCH_BYTES, end - start)
            if _LIBC.madvise(ctypes.c_void_p(base + start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE):
                return False
        return True

    def touch_first(self, count: int, stop: threading.Event) -> None:
        """Touch buffers in order, those that are not yet, until so many are or it is told to stop."""
        while self.touched < min(count, self.count) and not stop.is_set() and self.touch(self.touched):
            self.touched += 1

    def view(self, index: int) -> memoryview:
        """Give the bytes of one buffer."""
        return self._view[index * self.size : (index + 1) * self.size]

    def shrink(self, count: int) -> None:
        """Give the memory of all buffers but the first ones back to the system."""
        start = -(-count * self.size // mmap.PAGESIZE) * mmap.PAGESIZE
        if start < len(self.memory):
            self.memory.madvise(mmap.MADV_DONTNEED, start)
        self.count, self.touched = count, min(count, self.touched)


def _anonymous(nbytes: int, huge: bool) -> mmap.mmap:
    memory = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        # Pinning 4 KiB pages for a direct read costs a slow core more time than the disk needs.
        with contextlib.suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
