"""Memory in equal pieces: the slots of a cache, staging buffers, and whatever a file is read into."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Buffers of this size on ask for huge pages.
HUGE_PAGE_BYTES = 4 * 1024**2


class Buffers:
    """Equal page-aligned buffers in one mapping of anonymous memory.

    The system gives a page when it is first written. The mapping lives as long as this object or any tensor made of it.

    Args:
        count: How many buffers.
        size: Size of each in bytes.
        huge: Ask for huge pages. They suit memory that is read into again and again: a disk gave 1.9 GB/s into them and
            0.9 into pages of 4 KiB. For memory that is read into once they can cost more than they save
            (benchmarks/RESULTS.md).

    Attributes:
        memory: The mapping.
    """

    def __init__(self, count: int, size: int, huge: bool = True) -> None:
        self.count = count
        self.size = size
        self.memory = mmap.mmap(-1, max(count * size, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if huge and size >= HUGE_PAGE_BYTES:
            # Pinning 4 KiB pages for a direct read costs a slow core more time than the disk needs.
            with contextlib.suppress(OSError, AttributeError):
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self.memory)
        self._used: set[int] = set()

    def view(self, index: int) -> memoryview:
        """Return the bytes of one buffer."""
        return self._view[index * self.size : (index + 1) * self.size]

    def first_use(self, index: int) -> bool:
        """Note that a buffer is filled now; True the first time, when it may have no pages yet."""
        new = index not in self._used
        self._used.add(index)
        return new

    def tensor(self, index: int, position: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a tensor that is a view of one buffer, from byte `position` on."""
        import torch  # the preload uses buffers before torch is imported

        offset = index * self.size + position
        return torch.frombuffer(self.memory, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def touch(memory: memoryview) -> None:
    """Take the pages of writable memory from the system, by writing zeros; other threads run on meanwhile.

    A read into new memory would take them too; but then no other thread of the process can map memory for as long as
    the system takes to find and clear them: on one virtual machine importing torch took 14 s for this, alone 5. A write
    holds up nobody from Linux 6.4 on, where a page fault locks only the mapping that it is in.
    """
    if memory:
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 0, len(memory))
