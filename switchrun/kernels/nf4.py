"""Matrices in 4 bit, NF4 in blocks of 64, as bitsandbytes stores them (Dettmers et al. 2023, arXiv:2305.14314).

The matrix is taken as one long row. Every 64 elements share a float32, `absmax`, their largest magnitude, and each is
the nearest of 16 values in [-1, 1] times that. Two codes make a byte, the first in the high bits. A block may run from
one row into the next, which bitsandbytes 0.50.2's CPU kernels get wrong on some processors: they take it that each row
begins a block. So they are given several rows as one, whose length is a multiple of 64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch

from switchrun.kernels.bitsandbytes_ops import operations
from switchrun.kernels.row_blocks import Unpack, largest_block, linear_by_blocks, linear_by_parts, row_blocks
from switchrun.machine.processor import has_bf16_instructions
from switchrun.store.layout import NF4_BLOCK, nf4_rows_to_a_block

#: The value of each code: quantiles of the normal distribution, from the paper's appendix E.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

#: The code of 0.0, which fills the last byte of an odd number of elements.
_ZERO_CODE = 7

#: Cells of the grid that stands in for a search; the midpoints between values are ten cells apart and more.
_CELLS = 256
_HALF = (_CELLS - 1) / 2


def packed_size(shape: tuple[int, int]) -> tuple[int, int]:
    """Tell how many bytes of codes, and how many absmax, a matrix of this shape takes."""
    elements = shape[0] * shape[1]
    return -(-elements // 2), -(-elements // NF4_BLOCK)


def quantise_nf4(weight: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    """Quantise a matrix to the bytes of `bitsandbytes.functional.quantize_4bit(..., blocksize=64, quant_type="nf4")`.

    Takes about 10 MiB of scratch memory.

    Args:
        weight: `[out, in]`, floating, finite, on the CPU; any strides.
        packed: uint8 `[ceil(out × in / 2)]`; written.
        absmax: float32 `[ceil(out × in / 64)]`; written.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    shape = (weight.shape[0], weight.shape[1])
    _check_storage(packed, absmax, shape)
    for rows, codes, scales in quantised_blocks(weight):
        here, there = _storage_of(rows, shape[1])
        pack(codes, packed[here])
        absmax[there] = scales


def quantised_blocks(weight: torch.Tensor, multiple: int = 1) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Quantise a matrix a few rows at a time.

    Args:
        weight: As for `quantise_nf4`.
        multiple: Every block but the last has a multiple of so many rows, and of as many as end a block of 64.

    Yields:
        The rows, the code of each of their elements (uint8, flat) and their absmax (float32, flat); both tensors are
        valid until the next are asked for.
    """
    shape = (weight.shape[0], weight.shape[1])
    multiple = math.lcm(multiple, nf4_rows_to_a_block(shape[1]))
    largest = largest_block(shape, multiple)
    search, buffer, scales = _Search(largest), torch.empty(largest), torch.empty(-(-largest // NF4_BLOCK))
    for rows in row_blocks(shape, multiple):
        values = buffer[: (rows.stop - rows.start) * shape[1]]
        values.view(-1, shape[1]).copy_(weight[rows])
        absmax = scales[: -(-len(values) // NF4_BLOCK)]
        _scale_to_one(values, absmax)
        yield rows, search.nearest_codes(values), absmax


def linear_nf4(x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Multiply with a matrix in 4 bit: `x @ weight.T`.

    The weights are unpacked to float32, a few rows at a time, and the product is float32. Where bitsandbytes is faster
    (bfloat16 on a CPU that knows it, and CUDA) it unpacks larger pieces to the dtype of `x`, which are then multiplied
    as any other matrix. The same call gives the same bits. CUDA has not been run yet.

    Args:
        x: `[..., in]`, float32, bfloat16 or float16.
        packed: uint8 `[ceil(out × in / 2)]`.
        absmax: float32 `[ceil(out × in / 64)]`.
        shape: `(out, in)`.

    Returns:
        `[..., out]`, in the dtype of `x`.

    Raises:
        ValueError: Shapes or dtypes do not fit together.
    """
    _check_storage(packed, absmax, shape)
    multiple = nf4_rows_to_a_block(shape[1])
    if x.is_cuda or (bitsandbytes_unpacks(x.dtype) and x.device.type == "cpu" and shape[0] % multiple == 0):
        return _linear_bitsandbytes(x, packed, absmax, shape)
    pairs = _pair_table().to(x.device)

    def unpacker(largest: int) -> Unpack:
        indices = torch.empty(largest // 2 + 1, dtype=torch.int32, device=x.device)

        def unpack(rows: slice, buffer: torch.Tensor) -> None:
            here, there = _storage_of(rows, shape[1])
            codes = indices[: here.stop - here.start].copy_(packed[here])
            _look_up_pairs(codes, pairs, buffer)
            _scale_back(buffer, absmax[there])

        return unpack

    return linear_by_blocks(x, shape, unpacker, multiple).to(x.dtype)


def bitsandbytes_unpacks(dtype: torch.dtype) -> bool:
    """Tell whether this CPU unpacks faster with bitsandbytes: in bfloat16 with AVX-512, 1.5 ms against 7 a matrix.

    In float32, and on processors without these instructions, it is no faster (`benchmarks/quantised.py`).
    """
    return dtype is torch.bfloat16 and has_bf16_instructions()


def _check_storage(packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> None:
    if (len(packed), len(absmax)) != packed_size(shape) or packed.ndim != 1 or absmax.ndim != 1:
        raise ValueError(f"codes {list(packed.shape)} and absmax {list(absmax.shape)} do not fit {list(shape)}")
    if packed.dtype != torch.uint8 or absmax.dtype != torch.float32:
        raise ValueError(f"codes must be uint8 and absmax float32, not {packed.dtype} and {absmax.dtype}")


def _storage_of(rows: slice, length: int) -> tuple[slice, slice]:
    """Which bytes, and which absmax, hold some rows; the first of them begins a block."""
    begin, end = rows.start * length, rows.stop * length
    return slice(begin // 2, -(-end // 2)), slice(begin // NF4_BLOCK, -(-end // NF4_BLOCK))


def _scale_to_one(values: torch.Tensor, absmax: torch.Tensor) -> None:
    """Divide by the largest magnitude of each block, which is noted; rounded as bitsandbytes rounds."""
    whole = len(values) // NF4_BLOCK
    blocks = values[: whole * NF4_BLOCK].view(whole, NF4_BLOCK)
    if whole:
        largest = torch.maximum(blocks.amax(1), -blocks.amin(1)).abs_()
        absmax[:whole] = largest
        blocks.mul_((1.0 / largest.clamp_(min=1e-38)).unsqueeze(1))
    rest = values[whole * NF4_BLOCK :]
    if len(rest):
        # A block cut short is divided, not multiplied by an inverse, and its absmax never 0.
        absmax[whole] = rest.abs().max().clamp_(min=1e-38)
        rest.div_(absmax[whole])


class _Search:
    """Finds the code nearest to each value in [-1, 1]: what `torch.bucketize` finds, several times faster.

    A grid stands in for the search. Each of its cells has one midpoint nearest to it, and no other is near any value in
    the cell; so a value's code is that midpoint's number, plus 1 if the value is beyond it.

    Args:
        size: The most values searched for at once.
    """

    def __init__(self, size: int) -> None:
        values = torch.tensor(NF4_VALUES)
        midpoints = (values[:-1] + values[1:]) / 2
        centres = (torch.arange(_CELLS) + 0.5 - _HALF) / _HALF
        nearest = (centres.unsqueeze(1) - midpoints).abs().argmin(1)
        # A midpoint and its number lie side by side, so that one look-up, of a float64, brings both.
        table = torch.empty(_CELLS, 2)
        table[:, 0] = midpoints[nearest]
        table.view(torch.int32)[:, 1] = nearest.int()
        self._table = table.view(torch.float64).view(-1)
        self._grid = torch.empty(size)
        self._cells = torch.empty(size, dtype=torch.int32)
        self._found = torch.empty(size, dtype=torch.float64)
        self._codes = torch.empty(size, dtype=torch.uint8)

    def nearest_codes(self, values: torch.Tensor) -> torch.Tensor:
        """Search; `values` is float32 `[count]`, the answer uint8 `[count]`, valid until the next call."""
        count = len(values)
        grid, found = self._grid[:count], self._found[:count]
        # The clamp keeps what is not a number from being looked up outside the table.
        cells = self._cells[:count].copy_(torch.mul(values, _HALF, out=grid).add_(_HALF)).clamp_(0, _CELLS - 1)
        torch.index_select(self._table, 0, cells, out=found)
        midpoints, numbers = found.view(torch.float32)[::2], found.view(torch.int32)[1::2]
        # The sign bit of midpoint - value, spread over the integer: -1 beyond it, else 0. Comparing is slower.
        beyond = torch.sub(midpoints, values, out=grid).view(torch.int32).bitwise_right_shift_(31)
        return self._codes[:count].copy_(torch.sub(numbers, beyond, out=cells))


def pack(codes: torch.Tensor, packed: torch.Tensor) -> None:
    """Put two codes in a byte, the first in the high bits; both are uint8 and flat."""
    if len(codes) % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=_ZERO_CODE)
    torch.add(codes[1::2], codes[::2], alpha=16, out=packed)


@cache
def _pair_table() -> torch.Tensor:
    """The two float32 values that each byte stands for, as one float64: half as many copies as value by value."""
    values = torch.tensor(NF4_VALUES)
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
    return pairs.view(torch.float64).view(-1)


def _look_up_pairs(codes: torch.Tensor, pairs: torch.Tensor, buffer: torch.Tensor) -> None:
    """Write the values of the codes into a flat float32 buffer, which may end within a byte."""
    if len(buffer) % 2:
        buffer.copy_(torch.index_select(pairs, 0, codes).view(torch.float32)[: len(buffer)])
    else:
        torch.index_select(pairs, 0, codes, out=buffer.view(torch.float64))


def _scale_back(values: torch.Tensor, absmax: torch.Tensor) -> None:
    whole = len(values) // NF4_BLOCK
    values[: whole * NF4_BLOCK].view(whole, NF4_BLOCK).mul_(absmax[:whole].unsqueeze(1))
    if len(values) % NF4_BLOCK:
        values[whole * NF4_BLOCK :].mul_(absmax[whole])


def _linear_bitsandbytes(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    if x.shape[-1] != shape[1]:
        raise ValueError(f"a row of x has {x.shape[-1]} elements, a row of the matrix {shape[1]}")
    multiple = nf4_rows_to_a_block(shape[1])

    def product(rows: slice) -> torch.Tensor:
        here, there = _storage_of(rows, shape[1])
        count = rows.stop - rows.start
        long_rows = (count // multiple, shape[1] * multiple) if count % multiple == 0 else (count, shape[1])
        block = operations().dequantize_4bit(packed[here], absmax[there], NF4_BLOCK, "nf4", long_rows, x.dtype)
        return torch.nn.functional.linear(x, block.view(count, shape[1]))

    return linear_by_parts(x, shape, product, multiple)
