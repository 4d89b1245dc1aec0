"""Matrices that multiply in ways of their own, in few bits above all, and how those lie in a slot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from switchrun.experts.int8 import linear_int8, quantise_int8
from switchrun.experts.nf4 import linear_nf4, quantise_nf4
from switchrun.experts.nf4_tiles import linear_tiled, quantise_tiled
from switchrun.experts.product import linear
from switchrun.experts.slots import TORCH_DTYPES, Buffers, ExpertWeights
from switchrun.store.layout import Layout

#: Brings a tensor somewhere.
Move = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """A matrix `[out, in]` in LLM.int8's row-wise form: views of a slot.

    Attributes:
        codes: int8 `[out, in]`.
        scb: float32 `[out]`, the largest magnitude of each row.
    """

    codes: torch.Tensor
    scb: torch.Tensor

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Give `x @ weight.T`, in the dtype of `x`."""
        return linear_int8(x, self.codes, self.scb)

    def moved(self, move: Move) -> Int8Matrix:
        """Give the matrix made of what `move` gives for each of its tensors."""
        return Int8Matrix(move(self.codes), move(self.scb))


@dataclass(frozen=True, slots=True)
class Nf4Matrix:
    """A matrix in NF4, blocks of 64: views of a slot.

    Attributes:
        packed: uint8, two codes a byte.
        absmax: bfloat16, the largest magnitude of each block.
        shape: `(out, in)`.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, int]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Give `x @ weight.T`, in the dtype of `x`."""
        return linear_nf4(x, self.packed, self.absmax.float(), self.shape)

    def moved(self, move: Move) -> Nf4Matrix:
        """Give the matrix made of what `move` gives for each of its tensors."""
        return Nf4Matrix(move(self.packed), move(self.absmax), self.shape)


@dataclass(frozen=True, slots=True)
class TiledNf4Matrix:
    """A matrix in NF4 whose codes lie in tiles: views of a slot.

    Attributes:
        tiles: uint8 `[tiles, pairs, 32]`.
        absmax: bfloat16 `[blocks, rows]`; see `linear_tiled` for both.
        shape: `(out, in)`.
    """

    tiles: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, int]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Give `x @ weight.T`, in the dtype of `x`."""
        return linear_tiled(x, self.tiles, self.absmax, self.shape)

    def moved(self, move: Move) -> TiledNf4Matrix:
        """Give the matrix made of what `move` gives for each of its tensors."""
        return TiledNf4Matrix(move(self.tiles), move(self.absmax), self.shape)


@dataclass(frozen=True, slots=True)
class ArrivingMatrix:
    """A matrix that is still being read, when what is computed before it can begin.

    Attributes:
        matrix: A view of the slot that it is read to.
        wait: Blocks until it is there; raises what the read has raised.
    """

    matrix: torch.Tensor
    wait: Callable[[], None]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Wait, and give `x @ weight.T`."""
        self.wait()
        return linear(x, self.matrix)

    def moved(self, move: Move) -> torch.Tensor:
        """Wait, and give what `move` gives."""
        self.wait()
        return move(self.matrix)


#: Matrices that are kept in few bits.
PackedMatrix = Int8Matrix | Nf4Matrix | TiledNf4Matrix


def multiply(x: torch.Tensor, matrix: torch.Tensor | PackedMatrix | ArrivingMatrix) -> torch.Tensor:
    """Give `x @ matrix.T`, whatever the matrix is kept in.

    Args:
        x: `[tokens, in]`.
        matrix: `[out, in]`, on the device of `x`; a plain one has its dtype too.

    Returns:
        `[tokens, out]`, in the dtype of `x`.
    """
    return linear(x, matrix) if isinstance(matrix, torch.Tensor) else matrix.product(x)


def moved(weights: ExpertWeights, move: Move) -> ExpertWeights:
    """Give an expert made of what `move` gives for each of its tensors."""
    wi, wo = (move(m) if isinstance(m, torch.Tensor) else m.moved(move) for m in (weights.wi, weights.wo))
    return ExpertWeights(wi, wo)


def views(buffers: Buffers, index: int, layout: Layout, dtype: str, d_model: int, d_ff: int) -> ExpertWeights:
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


def quantise(stored: ExpertWeights, into: ExpertWeights) -> None:
    """Pack an expert; blocks while it computes, and takes a few MiB of scratch memory.

    Args:
        stored: Matrices on the CPU, plain ones of any floating dtype; those in int8 are copied into int8.
        into: Views of a slot; written.

    Raises:
        ValueError: The shapes do not fit.
    """
    for weight, target in ((stored.wi, into.wi), (stored.wo, into.wo)):
        if isinstance(weight, Int8Matrix) and isinstance(target, Int8Matrix):
            target.codes.copy_(weight.codes)
            target.scb.copy_(weight.scb)
            continue
        assert isinstance(weight, torch.Tensor), "what is packed already is never packed again"
        if isinstance(target, Int8Matrix):
            quantise_int8(weight, target.codes, target.scb)
        elif isinstance(target, TiledNf4Matrix):
            quantise_tiled(weight, target.tiles, target.absmax)
        elif isinstance(target, Nf4Matrix):
            # bitsandbytes keeps absmax in float32. Rounding it adds 0.2 % to NF4's own error of 9 %, and saves 6 % of
            # the bytes.
            absmax = torch.empty(target.absmax.shape)
            quantise_nf4(weight, target.packed, absmax)
            target.absmax.copy_(absmax)
