"""What a slot holds and how it gets there: experts as stored, converted to another dtype, or packed into few bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import torch

from switchrun.checkpoint.types import ExpertKey, ExpertSlices
from switchrun.dtypes import QMOE
from switchrun.experts.buffers import Buffer
from switchrun.experts.source import ExpertSource, Load, StoreReads
from switchrun.kernels.matrices import (
    TORCH_DTYPES,
    ExpertWeights,
    Int8Matrix,
    Nf4Matrix,
    PackedMatrix,
    TiledNf4Matrix,
    quantise,
)
from switchrun.store import BackgroundWriter, ExpertStore, Layout


class Format(ABC):
    """How the experts of a cache are brought in. `load` is called on the model's thread, the rest on any."""

    def __init__(self, source: ExpertSource) -> None:
        self._source = source

    def load(self, key: ExpertKey) -> Load:
        """Decide how an expert will be brought in."""
        return replace(self._source.load(key), staged=self._is_staged(self._source.slices[key]))

    def _is_staged(self, slices: ExpertSlices) -> bool:  # noqa: ARG002 - for those who override it
        return True

    def place(self, load: Load, slot: Buffer) -> ExpertWeights:
        """Return views of what was read into a slot; a `DamagedExpertError` if it is not what it should be."""
        return self._source.weights(load, slot)

    @abstractmethod
    def convert(self, load: Load, staging: Buffer, slot: Buffer) -> ExpertWeights:
        """Convert what was read into a staging buffer into a slot; blocks while it computes."""


class PlainFormat(Format):
    """Experts as the checkpoint has them, if that is `dtype` or QMoE's; else converted to `dtype`."""

    def __init__(self, source: ExpertSource, dtype: torch.dtype) -> None:
        super().__init__(source)
        self._dtype = dtype

    def _is_staged(self, slices: ExpertSlices) -> bool:
        return any(matrix.dtype != QMOE and TORCH_DTYPES[matrix.dtype] != self._dtype for matrix in slices)

    def convert(self, load: Load, staging: Buffer, slot: Buffer) -> ExpertWeights:
        """Copy."""
        slices, stored = self._source.slices[load.key], self._source.weights(load, staging)
        wi = slot.tensor(0, self._dtype, slices.wi.shape)
        wo = slot.tensor(wi.nbytes, self._dtype, slices.wo.shape)
        for target, source in ((wi, stored.wi), (wo, stored.wo)):
            assert isinstance(source, torch.Tensor)
            target.copy_(source)
        return ExpertWeights(wi, wo)


class Int8Format(Format):
    """Experts of a checkpoint in 8 bit, read in place; what is plain among them is packed by `layout` at each read."""

    def __init__(self, source: ExpertSource, layout: Layout) -> None:
        super().__init__(source)
        self._layout = layout

    def _is_staged(self, slices: ExpertSlices) -> bool:
        return any(matrix.dtype != "I8" or matrix.transposed for matrix in slices)

    def convert(self, load: Load, staging: Buffer, slot: Buffer) -> ExpertWeights:
        """Pack what is plain, and copy what is not."""
        weights = packed_views(slot, self._layout, "int8", self._source.slices[load.key].wi.shape)
        quantise(self._source.weights(load, staging), weights)
        return weights


class PackedFormat(Format):
    """Experts in few bits: from the store, or packed out of the source and offered to the store.

    Whatever is wrong with the store costs time and nothing else. Without a `writer` what was packed is written before
    it is used: an expert from the Hub took longer to come than the disk needs, and would have to come again.
    """

    def __init__(self, source: ExpertSource, store: ExpertStore, writer: BackgroundWriter | None) -> None:
        super().__init__(source)
        self._store = store
        self._reads = StoreReads(store, source.direct)
        self._writer = writer
        self._layout = store.layout

    def load(self, key: ExpertKey) -> Load:
        """Read what the store has, and else the source."""
        return self._reads.load(key) or super().load(key)

    def place(self, load: Load, slot: Buffer) -> ExpertWeights:
        """Verify an expert's checksum, at each read: a file may be damaged at any time."""
        self._reads.verify(load.key, slot)
        return self._views(load.key, slot)

    def convert(self, load: Load, staging: Buffer, slot: Buffer) -> ExpertWeights:
        """Pack, and have the result stored if a buffer is free for it."""
        weights = self._views(load.key, slot)
        quantise(self._source.weights(load, staging), weights)
        self._reads.renew(load.key)
        self._clear_padding(slot)
        if self._writer is None:
            self._store.write(load.key, self._packed(slot))
        else:
            self._writer.offer(load.key, self._packed(slot))
        return weights

    def _views(self, key: ExpertKey, slot: Buffer) -> ExpertWeights:
        return packed_views(slot, self._layout, self._store.manifest.dtype, self._source.slices[key].wi.shape)

    def _packed(self, slot: Buffer) -> memoryview:
        return slot.data[: self._layout.nbytes]

    def _clear_padding(self, slot: Buffer) -> None:
        """Give equal experts equal files, whatever the slot held before."""
        meaning = {part.name for part in self._layout.parts}
        for part in self._layout.tensors:
            if part.name not in meaning:
                slot.data[part.offset : part.offset + part.nbytes] = bytes(part.nbytes)


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
