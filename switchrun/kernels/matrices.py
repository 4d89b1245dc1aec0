"""The matrices of an expert, plain or in few bits, each with its own product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from switchrun.dtypes import WEIGHT_DTYPES
from switchrun.kernels.int8 import linear_int8, quantise_int8
from switchrun.kernels.nf4 import linear_nf4, linear_tiled, quantise_nf4, quantise_tiled
from switchrun.kernels.plain import linear
from switchrun.kernels.qmoe import QmoeMatrix

#: torch's dtypes by safetensors' names.
TORCH_DTYPES: Mapping[str, torch.dtype] = {
    **{stored: getattr(torch, name) for stored, name in WEIGHT_DTYPES.items()},
    "I8": torch.int8,
    "I32": torch.int32,
    "U8": torch.uint8,
}


@dataclass(frozen=True, slots=True)
class Int8Matrix:
    """A matrix in LLM.int8's row-wise form: views of a slot, as `quantise_int8` writes them."""

    codes: torch.Tensor
    scb: torch.Tensor

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x @ weight.T`, in the dtype of `x`."""
        return linear_int8(x, self.codes, self.scb)

    def pack(self, weight: torch.Tensor) -> None:
        """Write a plain matrix."""
        quantise_int8(weight, self.codes, self.scb)


@dataclass(frozen=True, slots=True)
class Nf4Matrix:
    """A matrix `(out, in)` in NF4: views of a slot, as `quantise_nf4` writes them, but `absmax` is bfloat16.

    Rounding it adds 0.2 % to NF4's own error of 9 %, and saves 6 % of the bytes.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, int]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x @ weight.T`, in the dtype of `x`."""
        return linear_nf4(x, self.packed, self.absmax.float(), self.shape)

    def pack(self, weight: torch.Tensor) -> None:
        """Write a plain matrix."""
        absmax = torch.empty(self.absmax.shape)
        quantise_nf4(weight, self.packed, absmax)
        self.absmax.copy_(absmax)


@dataclass(frozen=True, slots=True)
class TiledNf4Matrix:
    """A matrix `(out, in)` in NF4 whose codes lie in tiles: views of a slot, as `quantise_tiled` writes them."""

    tiles: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, int]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x @ weight.T`, in the dtype of `x`."""
        return linear_tiled(x, self.tiles, self.absmax, self.shape)

    def pack(self, weight: torch.Tensor) -> None:
        """Write a plain matrix."""
        quantise_tiled(weight, self.tiles, self.absmax)


#: Matrices that are kept in few bits.
PackedMatrix = Int8Matrix | Nf4Matrix | TiledNf4Matrix
Matrix = torch.Tensor | PackedMatrix | QmoeMatrix


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The matrices of one expert, `wi` [d_ff, d_model] and `wo` [d_model, d_ff]: views of a slot.

    They are valid while the cache keeps the expert in use, and no longer.
    """

    wi: Matrix
    wo: Matrix


def multiply(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Return `x @ matrix.T`, whatever the matrix is kept in: `[tokens, out]` for `[tokens, in]`, in the dtype of `x`.

    The matrix is on the device of `x`; a plain one has its dtype too.
    """
    return linear(x, matrix) if isinstance(matrix, torch.Tensor) else matrix.product(x)


def moved(weights: ExpertWeights, move: Callable[[torch.Tensor], torch.Tensor]) -> ExpertWeights:
    """Return the expert made of what `move` returns for each of its tensors."""

    def moved_matrix(matrix: Matrix) -> Matrix:
        if isinstance(matrix, torch.Tensor):
            return move(matrix)
        parts: dict[str, Any] = {field.name: getattr(matrix, field.name) for field in fields(matrix)}
        tensors = {name: move(part) for name, part in parts.items() if isinstance(part, torch.Tensor)}
        return type(matrix)(**parts | tensors)

    return ExpertWeights(moved_matrix(weights.wi), moved_matrix(weights.wo))


def quantise(stored: ExpertWeights, into: ExpertWeights) -> None:
    """Pack plain matrices on the CPU, or copy int8 ones, into a slot; takes a few MiB of scratch memory."""
    for weight, target in ((stored.wi, into.wi), (stored.wo, into.wo)):
        assert not isinstance(target, torch.Tensor)
        if isinstance(weight, Int8Matrix) and isinstance(target, Int8Matrix):
            target.codes.copy_(weight.codes)
            target.scb.copy_(weight.scb)
        else:
            assert isinstance(weight, torch.Tensor), "what is packed already is never packed again"
            assert not isinstance(target, QmoeMatrix), "nothing is compressed as QMoE does"
            target.pack(weight)
