"""The matrices of an expert, plain or in few bits, each with its own product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from switchrun.dtypes import WEIGHT_DTYPES
from switchrun.kernels.int8 import linear_int8, quantise_int8
from switchrun.kernels.nf4 import linear_nf4, quantise_nf4
from switchrun.kernels.nf4_tiles import linear_tiled, quantise_tiled
from switchrun.kernels.plain import linear

#: torch's dtypes by safetensors' names.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    **{stored: getattr(torch, name) for stored, name in WEIGHT_DTYPES.items()},
    "I8": torch.int8,
    "U8": torch.uint8,
}

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


#: Matrices that are kept in few bits.
PackedMatrix = Int8Matrix | Nf4Matrix | TiledNf4Matrix
Matrix = torch.Tensor | PackedMatrix


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The matrices of one expert, `wi` [d_ff, d_model] and `wo` [d_model, d_ff]: views of a slot.

    They are valid while the cache keeps the expert in use, and no longer.
    """

    wi: Matrix
    wo: Matrix


def multiply(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
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
