"""The memory of a fake GPU: handed out as torch's caching allocator does, limited, and watched for races."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch

NAME = "fakegpu"
_UNLIMITED = 1 << 50
_KIB, _MIB = 1 << 10, 1 << 20


class RaceError(AssertionError):
    """Two streams use the same memory, and nothing keeps one from doing so before the other is done."""


@dataclass(eq=False)
class Piece:
    """A part of a segment of memory, in use or free, between its neighbours in the same segment."""

    size: int
    small: bool
    free: bool = True
    before: Piece | None = None
    after: Piece | None = None

    def cut(self, size: int) -> Piece | None:
        """Keep so many bytes and give the rest as a free piece; None where torch does not split."""
        rest = self.size - size
        if rest < 512 if self.small else rest <= _MIB:
            return None
        self.size = size
        self.after, after = Piece(rest, self.small, True, self, self.after), self.after
        if after is not None:
            after.before = self.after
        return self.after

    def swallow(self, other: Piece) -> None:
        """Become one with the neighbour behind."""
        self.size += other.size
        self.after = other.after
        if self.after is not None:
            self.after.before = self


class Allocator:
    """What is taken from the driver, and how it is cut: torch's `c10/cuda/CUDACachingAllocator.cpp` in short.

    Up to 1 MiB comes from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, more from a segment of its own, in
    steps of 2 MiB. A segment goes back only whole, and only if that is asked for.
    """

    def __init__(self) -> None:
        self.reserved = 0
        self._free: list[Piece] = []

    def take(self, nbytes: int) -> Piece:
        size = max(1, -(-nbytes // 512)) * 512
        small = size <= _MIB
        fitting = [piece for piece in self._free if piece.small == small and piece.size >= size]
        if fitting:
            piece = min(fitting, key=lambda each: each.size)
            self._free.remove(piece)
        else:
            piece = Piece(
                2 * _MIB if small else 20 * _MIB if size < 10 * _MIB else -(-size // _MIB // 2) * 2 * _MIB, small
            )
            self.reserved += piece.size
        piece.free = False
        rest = piece.cut(size)
        if rest is not None:
            self._free.append(rest)
        return piece

    def give_back(self, piece: Piece) -> None:
        piece.free = True
        if piece.after is not None and piece.after.free:
            self._free.remove(piece.after)
            piece.swallow(piece.after)
        if piece.before is not None and piece.before.free:
            self._free.remove(piece.before)
            piece.before.swallow(piece)
            piece = piece.before
        self._free.append(piece)

    def empty_cache(self) -> None:
        whole = [piece for piece in self._free if piece.before is None and piece.after is None]
        self._free = [piece for piece in self._free if piece not in whole]
        self.reserved -= sum(piece.size for piece in whole)


@dataclass
class Device:
    """The state of one fake GPU; sizes in bytes."""

    index: int
    capacity: int = _UNLIMITED
    allocated: int = 0
    peak: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    side_copies: int = 0
    overlapping_copies: int = 0  # those that do not wait for all that was given to the GPU to compute before
    clock: int = 0  # uses of memory by the compute stream so far
    blocks: WeakValueDictionary[int, Block] = field(default_factory=WeakValueDictionary)
    allocator: Allocator = field(default_factory=Allocator)

    def block(self, inner: torch.Tensor) -> Block:
        """Give the block that a tensor lies in; a new one is allocated now."""
        storage = inner.untyped_storage()
        known = self.blocks.get(storage.data_ptr()) if storage.nbytes() else None
        return known or Block(self, storage)

    @property
    def pending(self) -> int:
        """Copies that nobody has waited for."""
        return sum(block.pending for block in self.blocks.values())


class Block:
    """Memory of a device, allocated as long as a tensor lies in it."""

    def __init__(self, device: Device, storage: torch.UntypedStorage) -> None:
        size = -(-storage.nbytes() // 512) * 512
        self.device, self.piece = device, None
        if device.allocated + size > device.capacity:
            raise torch.OutOfMemoryError(
                f"{NAME}:{device.index} out of memory: {size} bytes are wanted, {device.allocated} of "
                f"{device.capacity} are in use"
            )
        self.piece = device.allocator.take(size) if size else None
        self.size = self.piece.size if self.piece else 0
        self.storage = storage  # its address is not used again while it is known
        self.pending = 0  # copies into it that nobody has waited for
        device.allocated += self.size
        device.peak = max(device.peak, device.allocated)
        device.clock += 1
        self.last_use = device.clock
        device.blocks[storage.data_ptr()] = self

    def use(self) -> None:
        """Note that the compute stream reads or writes it."""
        if self.pending:
            raise RaceError("the compute stream uses memory that a side stream has yet to write")
        self.device.clock += 1
        self.last_use = self.device.clock

    def be_written_later(self, seen: int) -> None:
        """Note a copy into it by a side stream that has waited for the compute stream's uses up to a time."""
        if self.last_use > seen:
            raise RaceError("a side stream overwrites memory that the compute stream may still be using")
        self.pending += 1
        self.device.side_copies += 1
        self.device.overlapping_copies += seen < self.device.clock

    def __del__(self) -> None:
        if self.piece is not None:
            self.device.allocated -= self.size
            self.device.allocator.give_back(self.piece)
