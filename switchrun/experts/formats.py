"""What a slot holds and how it gets there: experts as stored, converted to another dtype, or packed into few bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from switchrun.checkpoint.types import ExpertKey, ExpertSlices, TensorSlice
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.buffers import Buffers
from switchrun.experts.reader import PAGE, ReadPlan, Segment, plan_reads
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
class Load:
    """How one expert will be brought in.

    Attributes:
        key: Which one.
        plan: The reads.
        staged: Whether they go to a staging buffer, and from there into the slot.
        stored: Where it is in the store, if that is where it is read from.
    """

    key: ExpertKey
    plan: ReadPlan
    staged: bool
    stored: StoredExpert | None = None


class Format(Protocol):
    """How the experts of a cache are brought in. `load` is called on the model's thread, the rest on any."""

    def load(self, key: ExpertKey) -> Load:
        """Decide how an expert will be brought in."""

    def place(self, load: Load, slots: Buffers, slot: int) -> ExpertWeights:
        """Make weights of what was read into a slot.

        Raises:
            DamagedExpertError: It is not what it should be.
        """

    def convert(self, load: Load, staging: Buffers, index: int, slots: Buffers, slot: int) -> ExpertWeights:
        """Convert what was read into a staging buffer into a slot; blocks while it computes."""

    def give_up(self, load: Load, error: BaseException) -> bool:
        """Take note that an expert could not be brought in, and tell whether there is another way to it."""


class DamagedExpertError(Exception):
    """What was read from the store is not what was written there."""


class PlainFormat:
    """Experts as the checkpoint has them, or converted to another dtype.

    Args:
        slices: Where every expert lies.
        dtype: What the weights in the slots shall be.
        direct: Whether reads are aligned for `O_DIRECT`.
    """

    def __init__(self, slices: Mapping[ExpertKey, ExpertSlices], dtype: torch.dtype, direct: bool) -> None:
        sample = next(iter(slices.values()))
        self._slices = slices
        self._dtype = dtype
        self._direct = direct
        self._converts = TORCH_DTYPES[sample.wi.dtype] != dtype

    def load(self, key: ExpertKey) -> Load:
        """See `Format`."""
        return Load(key, plan_reads(self._slices[key], self._direct), self._converts)

    def place(self, load: Load, slots: Buffers, slot: int) -> ExpertWeights:
        """See `Format`; gives views in the stored dtype."""
        return as_stored(self._slices[load.key], load.plan, slots, slot)

    def convert(self, load: Load, staging: Buffers, index: int, slots: Buffers, slot: int) -> ExpertWeights:
        """See `Format`; copies."""
        slices = self._slices[load.key]
        stored = as_stored(slices, load.plan, staging, index)
        wi = slots.tensor(slot, 0, self._dtype, slices.wi.shape)
        wo = slots.tensor(slot, wi.nbytes, self._dtype, slices.wo.shape)
        for target, source in ((wi, stored.wi), (wo, stored.wo)):
            assert isinstance(source, torch.Tensor)
            target.copy_(source)
        return ExpertWeights(wi, wo)

    def give_up(self, load: Load, error: BaseException) -> bool:  # noqa: ARG002 - the protocol's
        """See `Format`; there is no other way."""
        return False


class PackedFormat:
    """Experts in few bits: from the store, or packed out of the checkpoint and offered to the store.

    Whatever is wrong with the store costs time and nothing else.

    Args:
        slices: Where every expert lies in the checkpoint.
        store: Where packed ones may lie.
        writer: Writes there; None if nothing is to be written.
        direct: Whether reads are aligned for `O_DIRECT`.
    """

    def __init__(
        self,
        slices: Mapping[ExpertKey, ExpertSlices],
        store: ExpertStore,
        writer: BackgroundWriter | None,
        direct: bool,
    ) -> None:
        self._slices = slices
        self._store = store
        self._writer = writer
        self._direct = direct
        self._layout = store.layout
        self._d_ff, self._d_model = next(iter(slices.values())).wi.shape
        #: Experts that the store has failed to give; it is not asked for them before they were packed anew.
        self._failed: set[ExpertKey] = set()

    def load(self, key: ExpertKey) -> Load:
        """See `Format`."""
        stored = None if key in self._failed else self._store.expect(key)
        if stored is None:
            return Load(key, plan_reads(self._slices[key], self._direct), staged=True)
        length = -(-stored.nbytes // PAGE) * PAGE if self._direct else stored.nbytes
        segment = Segment(stored.path, stored.offset, length, 0, stored.nbytes)
        return Load(key, ReadPlan((segment,), (0, 0)), staged=False, stored=stored)

    def place(self, load: Load, slots: Buffers, slot: int) -> ExpertWeights:
        """See `Format`; an expert's checksum is verified at its first read."""
        if not self._store.is_verified(load.key):
            data = slots.view(slot)[: self._layout.nbytes]
            if not self._store.verify(load.key, data):
                raise DamagedExpertError("its bytes do not match its checksum")
        return self._views(slots, slot)

    def convert(self, load: Load, staging: Buffers, index: int, slots: Buffers, slot: int) -> ExpertWeights:
        """See `Format`; packs, and has the result stored if a buffer is free for it."""
        stored = as_stored(self._slices[load.key], load.plan, staging, index)
        weights = self._views(slots, slot)
        quantise(stored, weights)
        self._failed.discard(load.key)
        if self._writer is not None:
            self._clear_padding(slots, slot)
            self._writer.offer(load.key, slots.view(slot)[: self._layout.nbytes])
        return weights

    def give_up(self, load: Load, error: BaseException) -> bool:
        """See `Format`; what the store could not give is taken from the checkpoint."""
        if load.stored is None or not isinstance(error, CorruptCheckpointError | DamagedExpertError):
            return False
        self._failed.add(load.key)
        self._store.discard(load.key, str(error))
        return True

    def _views(self, slots: Buffers, slot: int) -> ExpertWeights:
        return packed_views(slots, slot, self._layout, self._store.manifest.dtype, self._d_model, self._d_ff)

    def _clear_padding(self, slots: Buffers, slot: int) -> None:
        """Let equal experts have equal files, whatever the slot held before."""
        meaning = {part.name for part in self._layout.parts}
        for part in self._layout.tensors:
            if part.name not in meaning:
                slots.view(slot)[part.offset : part.offset + part.nbytes] = bytes(part.nbytes)


class Int8Format:
    """Experts of a checkpoint in 8 bit, read in place; what is plain among them is packed each time it is read.

    Args:
        slices: Where every expert lies.
        layout: How an expert that is packed lies in a slot.
        direct: Whether reads are aligned for `O_DIRECT`.
    """

    def __init__(self, slices: Mapping[ExpertKey, ExpertSlices], layout: Layout, direct: bool) -> None:
        self._slices = slices
        self._layout = layout
        self._direct = direct
        self._d_ff, self._d_model = next(iter(slices.values())).wi.shape

    def load(self, key: ExpertKey) -> Load:
        """See `Format`."""
        slices = self._slices[key]
        staged = any(matrix.dtype != "I8" or matrix.transposed for matrix in slices)
        return Load(key, plan_reads(slices, self._direct), staged)

    def place(self, load: Load, slots: Buffers, slot: int) -> ExpertWeights:
        """See `Format`; gives views."""
        return as_stored(self._slices[load.key], load.plan, slots, slot)

    def convert(self, load: Load, staging: Buffers, index: int, slots: Buffers, slot: int) -> ExpertWeights:
        """See `Format`; packs what is plain, and copies what is not."""
        weights = packed_views(slots, slot, self._layout, "int8", self._d_model, self._d_ff)
        quantise(as_stored(self._slices[load.key], load.plan, staging, index), weights)
        return weights

    def give_up(self, load: Load, error: BaseException) -> bool:  # noqa: ARG002 - the protocol's
        """See `Format`; there is no other way."""
        return False


def as_stored(slices: ExpertSlices, plan: ReadPlan, buffers: Buffers, index: int) -> ExpertWeights:
    """Give an expert of the checkpoint that was read into a buffer, as views of what is stored."""
    at = dict(zip(slices.ranges, plan.positions, strict=True))

    def matrix(stored: TensorSlice) -> torch.Tensor | Int8Matrix:
        weight = _view(buffers, index, at[stored], stored)
        if stored.scales is None:
            return weight
        return Int8Matrix(weight, _view(buffers, index, at[stored.scales], stored.scales))

    return ExpertWeights(matrix(slices.wi), matrix(slices.wo))


def _view(buffers: Buffers, index: int, position: int, stored: TensorSlice) -> torch.Tensor:
    dtype = TORCH_DTYPES[stored.dtype]
    if stored.transposed:
        return buffers.tensor(index, position, dtype, stored.shape[::-1]).T
    return buffers.tensor(index, position, dtype, stored.shape)


def packed_views(buffers: Buffers, index: int, layout: Layout, dtype: str, d_model: int, d_ff: int) -> ExpertWeights:
    """Give the packed expert that lies, or will lie, at the start of a buffer.

    Args:
        buffers: The buffers.
        index: Which of them.
        layout: One of those of the dtype for the same sizes.
        dtype: `int8` or `nf4`.
        d_model: Width of the model.
        d_ff: Width between the two matrices.
    """

    def part(name: str) -> torch.Tensor:
        found = layout[name]
        return buffers.tensor(index, found.offset, TORCH_DTYPES[found.dtype], found.shape)

    def matrix(name: str, shape: tuple[int, int]) -> PackedMatrix:
        weight = part(f"{name}.weight")
        if dtype == "int8":
            return Int8Matrix(weight, part(f"{name}.SCB"))
        return (Nf4Matrix if weight.ndim == 1 else TiledNf4Matrix)(weight, part(f"{name}.absmax"), shape)

    return ExpertWeights(matrix("wi", (d_ff, d_model)), matrix("wo", (d_model, d_ff)))
