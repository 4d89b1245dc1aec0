"""Slots: equal, fixed buffers, each of which holds one expert, and the way its bytes get there."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from switchrun.checkpoint.types import ExpertSlices, TensorSlice
from switchrun.dtypes import WEIGHT_DTYPES
from switchrun.experts.reader import PAGE, Segment

if TYPE_CHECKING:
    from switchrun.experts.packed import Int8Matrix, Nf4Matrix

#: Buffers of this size on ask for huge pages.
_HUGE_PAGE_BUFFERS = 4 * 1024**2

_LIBC = ctypes.CDLL(None)
_MADV_POPULATE_WRITE = 23
_TOUCH_BYTES = 2 * 1024**2

#: torch's dtypes by safetensors' names.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    **{stored: getattr(torch, name) for stored, name in WEIGHT_DTYPES.items()},
    "I8": torch.int8,
    "U8": torch.uint8,
}


class Buffers:
    """One mapping of anonymous memory, cut into equal page-aligned buffers.

    Pages are taken from the system when they are first written, by the threads that read into them, or by `touch`.
    The buffers live as long as this object or any tensor made of them.

    Attributes:
        memory: The mapping.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count = count
        self.size = size
        self.memory = mmap.mmap(-1, max(count * size, PAGE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= _HUGE_PAGE_BUFFERS:
            # Pinning 4 KiB pages for a direct read costs a slow core more time than the disk needs.
            with contextlib.suppress(OSError, AttributeError):
                self.memory.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self.memory)

    def touch(self, index: int) -> bool:
        """Take one buffer's pages from the system; what is in them stays. Other threads run on meanwhile.

        Returns:
            Whether the system knows how (Linux 5.14 and later).
        """
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        first, end = index * self.size // mmap.PAGESIZE * mmap.PAGESIZE, (index + 1) * self.size
        # Step by step: meanwhile no other thread can map memory.
        for start in range(first, end, _TOUCH_BYTES):
            length = min(_TOUCH_BYTES, end - start)
            if _LIBC.madvise(ctypes.c_void_p(base + start), ctypes.c_size_t(length), _MADV_POPULATE_WRITE):
                return False
        return True

    def view(self, index: int) -> memoryview:
        """Give the bytes of one buffer."""
        return self._view[index * self.size : (index + 1) * self.size]

    def tensor(self, index: int, position: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Give a tensor that is a view of one buffer, from byte `position` on."""
        count = 1
        for extent in shape:
            count *= extent
        flat = torch.frombuffer(self.memory, dtype=dtype, count=count, offset=index * self.size + position)
        return flat.view(shape)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The matrices of one expert in memory, `wi` [d_ff, d_model] and `wo` [d_model, d_ff]: views of a slot.

    They are valid while the cache keeps the expert in use, and no longer.
    """

    wi: torch.Tensor | Int8Matrix | Nf4Matrix
    wo: torch.Tensor | Int8Matrix | Nf4Matrix


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Which reads bring an expert into a buffer, and at which byte of it each of its `ranges` then begins."""

    segments: tuple[Segment, ...]
    positions: tuple[int, ...]


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
