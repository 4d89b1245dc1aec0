"""Memory in equal pieces, taken from the system before it is needed. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

#: Buffers of this size on ask for huge pages.
HUGE_PAGE_BUFFERS = 4 * 1024**2


class Pages:
    """One mapping of anonymous memory, cut into equal page-aligned buffers.

    Pages are taken from the system when they are first written. The buffers live as long as this object or any tensor
    made of them.

    Args:
        count: How many buffers.
        size: Size of each.
        memory: Memory of at least that size, if there is some already.
        huge: Whether to ask for huge pages. They suit what is read into again and again: a disk gave 1.9 GB/s into them
            and 0.9 into pages of 4 KiB. But a virtual machine that has given its free memory back to its host took
            5.7 ms to get a huge page, and 1.2 ms for the same in small ones, which come from what it had not given back
            (2026-11-28, 6.18).

    Attributes:
        memory: The mapping.
        claimed: So many bytes, from the first on, have a user.
    """

    def __init__(self, count: int, size: int, memory: Pages | None = None, huge: bool = True) -> None:
        self.count = count
        self.size = size
        self.memory: mmap.mmap = (
            memory.memory if memory else _anonymous(count * size, huge=huge and size >= HUGE_PAGE_BUFFERS)
        )
        self.claimed: int = memory.claimed if memory else 0
        self._view = memoryview(self.memory)

    def claim(self, end: int) -> bool:
        """Note that all up to byte `end` is used from now on.

        Returns:
            Whether some of it had not been claimed: it may have no pages yet.
        """
        new = self.claimed < end
        self.claimed = max(self.claimed, end)
        return new

    def view(self, index: int) -> memoryview:
        """Give the bytes of one buffer."""
        return self._view[index * self.size : (index + 1) * self.size]

    def shrink(self, count: int) -> None:
        """Give the memory of all buffers but the first ones back to the system."""
        start = -(-count * self.size // mmap.PAGESIZE) * mmap.PAGESIZE
        if start < len(self.memory):
            self.memory.madvise(mmap.MADV_DONTNEED, start)
        self.count, self.claimed = count, min(count * self.size, self.claimed)


def touch(memory: memoryview) -> None:
    """Take the pages of writable memory from the system, by writing zeros; other threads run on meanwhile.

    A read into new memory would take them too, as madvise does; but then no other thread of the process can map memory
    for as long as the system takes to find them and to clear them. On a virtual machine that was slow to give pages
    importing torch took 14 s for this, alone 5 (2026-11-27). A write holds up nobody from Linux 6.4 on, where a page
    fault locks only the mapping that it is in.
    """
    if memory:
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 0, len(memory))


def _anonymous(nbytes: int, huge: bool) -> mmap.mmap:
    memory = mmap.mmap(-1, max(nbytes, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        # Pinning 4 KiB pages for a direct read costs a slow core more time than the disk needs.
        with contextlib.suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
