"""What a slot holds and how it gets there: experts as stored, converted to another dtype, or packed into few bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from switchrun.checkpoint.types import ExpertKey, ExpertSlices, TensorSlice
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.buffers import Buffer
from switchrun.experts.reader import PAGE, Segment
from switchrun.kernels.matrices import (
    TORCH_DTYPES,
    ExpertWeights,
    Int8Matrix,
    Nf4Matrix,
    PackedMatrix,
    TiledNf4Matrix,
    quantise,
)
from switchrun.store import BackgroundWriter, ExpertStore, Layout, StoredExpert


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Which reads bring an expert into a buffer, and at which byte of it each of its `ranges` then begins."""

    segments: tuple[Segment, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """How one expert will be brought in: by which reads, whether by way of a staging buffer, or out of the store."""

    key: ExpertKey
    plan: ReadPlan
    staged: bool
    stored: StoredExpert | None = None


class Format(ABC):
    """How the experts of a cache are brought in. `load` is called on the model's thread, the rest on any.

    Here they are read from the checkpoint; `direct` aligns the reads for `O_DIRECT`.
    """

    def __init__(self, slices: Mapping[ExpertKey, ExpertSlices], direct: bool) -> None:
        self._slices = slices
        self._direct = direct

    def load(self, key: ExpertKey) -> Load:
        """Decide how an expert will be brought in."""
        slices = self._slices[key]
        return Load(key, plan_reads(slices, self._direct), self._is_staged(slices))

    def _is_staged(self, slices: ExpertSlices) -> bool:  # noqa: ARG002 - for those who override it
        return True

    def place(self, load: Load, slot: Buffer) -> ExpertWeights:
        """Return views of what was read into a slot; a `DamagedExpertError` if it is not what it should be."""
        return self._as_stored(load, slot)

    @abstractmethod
    def convert(self, load: Load, staging: Buffer, slot: Buffer) -> ExpertWeights:
        """Convert what was read into a staging buffer into a slot; blocks while it computes."""

    def give_up(self, load: Load, error: BaseException) -> bool:  # noqa: ARG002 - for those who override it
        """Note that an expert could not be brought in; whether there is another way to it."""
        return False

    def _as_stored(self, load: Load, buffer: Buffer) -> ExpertWeights:
        return as_stored(self._slices[load.key], load.plan, buffer)


class DamagedExpertError(Exception):
    """What was read from the store is not what was written there."""


class PlainFormat(Format):
    """Experts as the checkpoint has them, or converted to `dtype`."""

    def __init__(self, slices: Mapping[ExpertKey, ExpertSlices], direct: bool, dtype: torch.dtype) -> None:
        super().__init__(slices, direct)
        self._dtype = dtype

    def _is_staged(self, slices: ExpertSlices) -> bool:
        return any(TORCH_DTYPES[matrix.dtype] != self._dtype for matrix in slices)

    def convert(self, load: Load, staging: Buffer, slot: Buffer) -> ExpertWeights:
        """Copy."""
        slices, stored = self._slices[load.key], self._as_stored(load, staging)
        wi = slot.tensor(0, self._dtype, slices.wi.shape)
        wo = slot.tensor(wi.nbytes, self._dtype, slices.wo.shape)
        for target, source in ((wi, stored.wi), (wo, stored.wo)):
            assert isinstance(source, torch.Tensor)
            target.copy_(source)
        return ExpertWeights(wi, wo)


class Int8Format(Format):
    """Experts of a checkpoint in 8 bit, read in place; what is plain among them is packed by `layout` at each read."""

    def __init__(self, slices: Mapping[ExpertKey, ExpertSlices], direct: bool, layout: Layout) -> None:
        super().__init__(slices, direct)
        self._layout = layout

    def _is_staged(self, slices: ExpertSlices) -> bool:
        return any(matrix.dtype != "I8" or matrix.transposed for matrix in slices)

    def convert(self, load: Load, staging: Buffer, slot: Buffer) -> ExpertWeights:
        """Pack what is plain, and copy what is not."""
        weights = packed_views(slot, self._layout, "int8", self._slices[load.key].wi.shape)
        quantise(self._as_stored(load, staging), weights)
        return weights


class PackedFormat(Format):
    """Experts in few bits: from the store, or packed out of the checkpoint and offered to the store.

    Whatever is wrong with the store costs time and nothing else.
    """

    def __init__(
        self, slices: Mapping[ExpertKey, ExpertSlices], direct: bool, store: ExpertStore, writer: BackgroundWriter
    ) -> None:
        super().__init__(slices, direct)
        self._store = store
        self._writer = writer
        self._layout = store.layout
        #: Experts that the store has failed to give; it is not asked for them until they have been packed again.
        self._failed: set[ExpertKey] = set()

    def load(self, key: ExpertKey) -> Load:
        """Read what the store has, and else the checkpoint."""
        stored = None if key in self._failed else self._store.expect(key)
        if stored is None:
            return super().load(key)
        length = -(-stored.nbytes // PAGE) * PAGE if self._direct else stored.nbytes
        segment = Segment(stored.path, stored.offset, length, 0, stored.nbytes, stored=True)
        return Load(key, ReadPlan((segment,), (0, 0)), staged=False, stored=stored)

    def place(self, load: Load, slot: Buffer) -> ExpertWeights:
        """Verify an expert's checksum, at each read: a file may be damaged at any time."""
        if not self._store.verify(load.key, self._packed(slot)):
            raise DamagedExpertError("its bytes do not match its checksum")
        return self._views(load.key, slot)

    def convert(self, load: Load, staging: Buffer, slot: Buffer) -> ExpertWeights:
        """Pack, and have the result stored if a buffer is free for it."""
        weights = self._views(load.key, slot)
        quantise(self._as_stored(load, staging), weights)
        self._failed.discard(load.key)
        self._clear_padding(slot)
        self._writer.offer(load.key, self._packed(slot))
        return weights

    def give_up(self, load: Load, error: BaseException) -> bool:
        """Take from the checkpoint what the store could not give."""
        if load.stored is None or not isinstance(error, CorruptCheckpointError | DamagedExpertError):
            return False
        self._failed.add(load.key)
        self._store.discard(load.key, str(error))
        return True

    def _views(self, key: ExpertKey, slot: Buffer) -> ExpertWeights:
        return packed_views(slot, self._layout, self._store.manifest.dtype, self._slices[key].wi.shape)

    def _packed(self, slot: Buffer) -> memoryview:
        return slot.data[: self._layout.nbytes]

    def _clear_padding(self, slot: Buffer) -> None:
        """Give equal experts equal files, whatever the slot held before."""
        meaning = {part.name for part in self._layout.parts}
        for part in self._layout.tensors:
            if part.name not in meaning:
                slot.data[part.offset : part.offset + part.nbytes] = bytes(part.nbytes)


def plan_reads(slices: ExpertSlices, direct: bool) -> ReadPlan:
    """Lay out the reads of one expert, aligned if `direct`; tensors that are neighbours in a file share one."""
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


def as_stored(slices: ExpertSlices, plan: ReadPlan, buffer: Buffer) -> ExpertWeights:
    """Return an expert of the checkpoint that was read into a buffer, as views of what is stored."""
    at = dict(zip(slices.ranges, plan.positions, strict=True))

    def matrix(stored: TensorSlice) -> torch.Tensor | Int8Matrix:
        weight = stored_view(buffer, at[stored], stored)
        if stored.scales is None:
            return weight
        return Int8Matrix(weight, stored_view(buffer, at[stored.scales], stored.scales))

    return ExpertWeights(matrix(slices.wi), matrix(slices.wo))


def stored_view(buffer: Buffer, position: int, stored: TensorSlice) -> torch.Tensor:
    """Return the tensor whose bytes were read to a place in a buffer, as a view."""
    dtype = TORCH_DTYPES[stored.dtype]
    if stored.transposed:
        return buffer.tensor(position, dtype, stored.shape[::-1]).T
    return buffer.tensor(position, dtype, stored.shape)


def packed_views(buffer: Buffer, layout: Layout, dtype: str, wi_shape: tuple[int, ...]) -> ExpertWeights:
    """Return the packed expert that lies, or will lie, at the start of a buffer.

    `layout` is one of those of the dtype, `int8` or `nf4`, for a `wi` of that shape, `(d_ff, d_model)`.
    """
    d_ff, d_model = wi_shape

    def part(name: str) -> torch.Tensor:
        found = layout[name]
        return buffer.tensor(found.offset, TORCH_DTYPES[found.dtype], found.shape)

    def matrix(name: str, shape: tuple[int, int]) -> PackedMatrix:
        weight = part(f"{name}.weight")
        if dtype == "int8":
            return Int8Matrix(weight, part(f"{name}.SCB"))
        return (Nf4Matrix if weight.ndim == 1 else TiledNf4Matrix)(weight, part(f"{name}.absmax"), shape)

    return ExpertWeights(matrix("wi", (d_ff, d_model)), matrix("wo", (d_model, d_ff)))
