"""Where an expert comes from as it is stored: the checkpoint's own files, the Hub, or what was kept of the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from switchrun.checkpoint.names import expert_prefix
from switchrun.checkpoint.range_check import check_range
from switchrun.checkpoint.types import ExpertKey, ExpertSlices, RemoteFile, SwitchCheckpoint, TensorSlice
from switchrun.dtypes import QMOE
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.buffers import Buffer
from switchrun.experts.reader import PAGE, Segment
from switchrun.kernels.matrices import TORCH_DTYPES, ExpertWeights, Int8Matrix, Matrix
from switchrun.kernels.qmoe import QmoeMatrix
from switchrun.planning.memory import reads_directly
from switchrun.store import ExpertForm, ExpertStore, StoredExpert, form_of, open_kept_stores
from switchrun.store.layout import ALIGNMENT


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Which reads bring an expert into a buffer, and at which byte of it each of its `ranges` then begins."""

    segments: tuple[Segment, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """How one expert will be brought in: by which reads, whether by way of a staging buffer, or out of which store."""

    key: ExpertKey
    plan: ReadPlan
    staged: bool = False
    store: StoreReads | None = None

    @property
    def from_hub(self) -> bool:
        """Whether it is read over the network."""
        return isinstance(self.plan.segments[0].file, RemoteFile)

    def give_up(self, error: BaseException) -> bool:
        """Note that the expert could not be brought in; whether there is another way to it."""
        return self.store is not None and self.store.give_up(self.key, error)


class DamagedExpertError(Exception):
    """What was read from the store is not what was written there."""


class StoreReads:
    """A store as experts are read from it: for what it has failed to give, it is not asked until that is renewed."""

    def __init__(self, store: ExpertStore, direct: bool) -> None:
        self.store = store
        self._direct = direct
        self._failed: set[ExpertKey] = set()

    def load(self, key: ExpertKey, positions: tuple[int, ...] = ()) -> Load | None:
        """Decide to read an expert, which has its ranges at these positions; None if the store lacks it."""
        stored = None if key in self._failed else self.store.expect(key)
        if stored is None:
            return None
        return Load(key, ReadPlan((stored_read(stored, self._direct),), positions), store=self)

    def verify(self, key: ExpertKey, buffer: Buffer) -> None:
        """Raise DamagedExpertError unless the expert was read to the buffer's start: a file may be damaged any time."""
        if not self.store.verify(key, buffer.data[: self.store.layout.nbytes]):
            raise DamagedExpertError("its bytes do not match its checksum")

    def give_up(self, key: ExpertKey, error: BaseException) -> bool:
        """Discard what the store could not give; False if that is not what the error is about."""
        if not isinstance(error, CorruptCheckpointError | DamagedExpertError):
            return False
        self._failed.add(key)
        self.store.discard(key, str(error))
        return True

    def renew(self, key: ExpertKey) -> None:
        """Note that an expert came another way, and may have been written again."""
        self._failed.discard(key)


class ExpertSource:
    """Experts as they are stored, by their keys. `load` is called on the model's thread, the rest on any.

    Args:
        slices: Where the checkpoint has them.
        direct: Whether reads of this machine's files are aligned for `O_DIRECT`.
        kept: The stores of experts that came from the Hub, by the form in which they are stored (`form_of`). What is
            read from there is written to them, before it is used.
    """

    def __init__(
        self,
        slices: Mapping[ExpertKey, ExpertSlices],
        direct: bool,
        kept: Mapping[ExpertForm, ExpertStore] | None = None,
    ) -> None:
        self.slices = slices
        self.direct = direct
        self._kept = {form: StoreReads(store, direct) for form, store in (kept or {}).items()}

    @classmethod
    def open(
        cls,
        checkpoint: SwitchCheckpoint,
        offload: Path,
        *,
        keep: bool,
        limit_bytes: int | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> ExpertSource:
        """Return a checkpoint's experts; `keep` is whether those from the Hub are kept in `offload` as they are stored.

        What is kept there already is read in any case. Experts in int8 have no other form than the packed one.
        """
        kept = {}
        if checkpoint.hub is not None and checkpoint.stored_dtype != "I8":
            kept = open_kept_stores(offload, checkpoint, limit_bytes=limit_bytes, read_only=not keep, warn=warn)
        return cls(checkpoint.experts, reads_directly(checkpoint), kept)

    def load(self, key: ExpertKey) -> Load:
        """Decide from where an expert will be read: the store if it has it, else the checkpoint."""
        slices = self.slices[key]
        kept = self._store_of(slices)
        load = None if kept is None else kept.load(key, _kept_positions(slices))
        return load or Load(key, plan_reads(slices, self.direct))

    def _store_of(self, slices: ExpertSlices) -> StoreReads | None:
        return self._kept.get(form_of(slices)) if self._kept else None

    def weights(self, load: Load, buffer: Buffer) -> ExpertWeights:
        """Return views of what was read into a buffer, once it is verified, and kept if it came from the Hub.

        Raises:
            DamagedExpertError: The store has given other bytes than were written there.
            CorruptCheckpointError: The checkpoint's own bytes are not what they should be.
        """
        slices = self.slices[load.key]
        if load.store is not None:
            load.store.verify(load.key, buffer)
        else:
            for tensor, position in zip(slices.ranges, load.plan.positions, strict=True):
                check_range(tensor, buffer.data, position)
            kept = self._store_of(slices)
            if kept is not None:
                if kept.store.writable:
                    kept.store.write(load.key, *_in_layout(slices, load.plan, buffer, kept.store.layout.nbytes))
                kept.renew(load.key)
        return as_stored(load.key, slices, load.plan, buffer)


def stored_read(stored: StoredExpert, direct: bool) -> Segment:
    """Return the read that brings a stored expert to the start of a buffer."""
    length = -(-stored.nbytes // PAGE) * PAGE if direct else stored.nbytes
    return Segment(stored.path, stored.offset, length, 0, stored.nbytes, stored=True)


def plan_reads(slices: ExpertSlices, direct: bool) -> ReadPlan:
    """Lay out the reads of one expert, aligned if `direct`; tensors that are neighbours in a file share one.

    A read begins with the local header, where a tensor has one.
    """
    direct = direct and not isinstance(slices.wi.file, RemoteFile)
    groups: list[list[TensorSlice]] = []
    for tensor in sorted(slices.ranges, key=lambda tensor: (str(tensor.file), tensor.offset)):
        last = groups[-1][-1] if groups else tensor
        gap = tensor.offset - (last.offset + last.nbytes)
        # A gap is read along where that is no more than alignment, or another request, costs anyway.
        if groups and last.file == tensor.file and 0 <= gap <= (PAGE if direct or _is_remote(tensor) else 0):
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
    segments, begins, cursor = [], {}, 0
    for group in groups:
        first, end = group[0], group[-1].offset + group[-1].nbytes
        start = first.offset - first.header_bytes
        # Where a read begins is free unless it is direct: then the first tensor is aligned, for the sake of products.
        cursor = cursor if direct else cursor + -(cursor + first.header_bytes) % ALIGNMENT
        start = start - start % PAGE if direct else start
        length = -(-(end - start) // PAGE) * PAGE if direct else end - start
        segments.append(Segment(first.file, start, length, cursor, end - start))
        for tensor in group:
            begins[id(tensor)] = cursor + tensor.offset - start
        cursor += length
    return ReadPlan(tuple(segments), tuple(begins[id(tensor)] for tensor in slices.ranges))


def _is_remote(tensor: TensorSlice) -> bool:
    return isinstance(tensor.file, RemoteFile)


def _kept_positions(slices: ExpertSlices) -> tuple[int, ...]:
    """Return where each range begins in a kept expert: one after another, each aligned."""
    positions, end = [], 0
    for tensor in slices.ranges:
        positions.append(end + -end % ALIGNMENT)
        end = positions[-1] + tensor.nbytes
    return tuple(positions)


def _in_layout(slices: ExpertSlices, plan: ReadPlan, buffer: Buffer, nbytes: int) -> Iterator[memoryview | bytes]:
    """Yield what was read as a kept expert has it, which takes so many bytes."""
    end = 0
    for tensor, kept, position in zip(slices.ranges, _kept_positions(slices), plan.positions, strict=True):
        yield bytes(kept - end)
        yield buffer.data[position : position + tensor.nbytes]
        end = kept + tensor.nbytes
    yield bytes(nbytes - end)


def as_stored(key: ExpertKey, slices: ExpertSlices, plan: ReadPlan, buffer: Buffer) -> ExpertWeights:
    """Return an expert of the checkpoint that was read into a buffer, as views of what is stored."""
    at = dict(zip(map(id, slices.ranges), plan.positions, strict=True))

    def matrix(name: str, stored: TensorSlice) -> Matrix:
        parts = [stored_view(buffer, at[id(part)], part) for part in stored.parts]
        if stored.dtype == QMOE:
            codes = buffer.tensor(at[id(stored)], torch.int16, (stored.nbytes // 2,))
            place = f"{stored.file}: tensor {expert_prefix(*key)}.{name}.w_comp"
            offsets, extremes = parts
            return QmoeMatrix(codes, offsets, extremes, stored.shape[1], place)
        weight = stored_view(buffer, at[id(stored)], stored)
        return Int8Matrix(weight, *parts) if parts else weight

    return ExpertWeights(matrix("wi", slices.wi), matrix("wo", slices.wo))


def stored_view(buffer: Buffer, position: int, stored: TensorSlice) -> torch.Tensor:
    """Return the tensor whose bytes were read to a place in a buffer, as a view."""
    dtype = TORCH_DTYPES[stored.dtype]
    if stored.transposed:
        return buffer.tensor(position, dtype, stored.shape[::-1]).T
    return buffer.tensor(position, dtype, stored.shape)
