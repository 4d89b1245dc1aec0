"""Slots: equal, fixed buffers, each of which holds one expert, and the way its bytes get there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from switchrun.checkpoint.types import ExpertSlices, TensorSlice
from switchrun.dtypes import WEIGHT_DTYPES
from switchrun.experts.pages import Pages
from switchrun.experts.reader import PAGE, Segment

if TYPE_CHECKING:
    from switchrun.experts.packed import ArrivingMatrix, PackedMatrix

#: torch's dtypes by safetensors' names.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    **{stored: getattr(torch, name) for stored, name in WEIGHT_DTYPES.items()},
    "I8": torch.int8,
    "U8": torch.uint8,
}


class Buffers(Pages):
    """Equal buffers in one mapping, and tensors that are views of them."""

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

    They are valid while the cache keeps the expert in use, and no longer. `wo` may still be on its way.
    """

    wi: torch.Tensor | PackedMatrix
    wo: torch.Tensor | PackedMatrix | ArrivingMatrix


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
