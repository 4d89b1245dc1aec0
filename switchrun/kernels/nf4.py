"""Matrices in 4 bit, NF4 in blocks of 64, as bitsandbytes stores them (Dettmers et al. 2023, arXiv:2305.14314).

The matrix is taken as one long row. Every 64 elements share a float32, `absmax`, their largest magnitude, and each is
the nearest of 16 values in [-1, 1] times that. Two codes make a byte, the first in the high bits. A block may run from
one row into the next, which bitsandbytes 0.50.2's CPU kernels get wrong on some processors: they take it that each row
begins a block. So they are given several rows as one, whose length is a multiple of 64.

Codes may also lie in tiles, in the order that bitsandbytes' product on CPUs with AVX-512 for bfloat16 wants. That
product (`gemv_4bit`, bitsandbytes 0.50) unpacks codes in registers and never writes a weight to memory: 0.5 ms for
an expert of switch-c and one token, where unpacking it first takes 3.6. It wants 32 rows beside one another: a tile
has the codes of 32 rows, 64 of two columns after one another, and the scales lie block by block, one for each row. It
also wants every row to begin a block of 64. Where rows end within one (2,080 is 32.5 blocks), `f` rows are taken as
one long row, and `x` is multiplied as `f` rows, each of them zero but for its own part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch

from switchrun.kernels.bitsandbytes_ops import operations
from switchrun.kernels.row_blocks import Unpack, largest_block, linear_by_blocks, linear_by_parts, row_blocks, rows_of
from switchrun.machine.processor import has_bf16_instructions
from switchrun.store.layout import NF4_BLOCK, NF4_TILE_ROWS, nf4_rows_to_a_block, nf4_sizes

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
#: bitsandbytes' product of tiles rounds NF4's values to bfloat16; with the codes of normal weights, they are larger by
#: so much on average (of absmax). Where `x` has no zero mean, as after ReLU, that adds up: to 2 % of the result in `wo`
#: of switch-c, where NF4's own error is 10 %. So it is taken off again, which leaves 0.2 %.
_LARGER_ON_AVERAGE = 1.81e-4
#: The same product unpacks codes again for every few rows of `x`; above so many it is faster to do so once.
_MOST_ROWS = 128


def quantise_nf4(weight: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    """Quantise a matrix to the bytes of `bitsandbytes.functional.quantize_4bit(..., blocksize=64, quant_type="nf4")`.

    Takes about 10 MiB of scratch memory. `weight` is `[out, in]`, floating, finite, on the CPU. Written are `packed`,
    uint8 `[ceil(out × in / 2)]`, and `absmax`, float32 `[ceil(out × in / 64)]`.
    """
    shape = (weight.shape[0], weight.shape[1])
    _check_storage(packed, absmax, shape)
    for rows, codes, scales in quantised_blocks(weight):
        here, there = _storage_of(rows, shape[1])
        pack(codes, packed[here])
        absmax[there] = scales


def quantised_blocks(weight: torch.Tensor, multiple: int = 1) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Quantise a matrix a few rows at a time: each time but the last, a multiple of `multiple` that ends a block.

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

    `x` is `[..., in]`, float32, bfloat16 or float16, the matrix `(out, in)` as `quantise_nf4` writes it. The result is
    `[..., out]`, in the dtype of `x`.
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
            if len(buffer) % 2:  # it ends within a byte
                buffer.copy_(torch.index_select(pairs, 0, codes).view(torch.float32)[: len(buffer)])
            else:
                torch.index_select(pairs, 0, codes, out=buffer.view(torch.float64))
            _scale_back(buffer, absmax[there])

        return unpack

    return linear_by_blocks(x, shape, unpacker, multiple).to(x.dtype)


def bitsandbytes_unpacks(dtype: torch.dtype) -> bool:
    """Whether this CPU unpacks faster with bitsandbytes: in bfloat16 with AVX-512, 1.5 ms against 7 a matrix.

    In float32, and on processors without these instructions, it is no faster (`benchmarks/quantised.py`).
    """
    return dtype is torch.bfloat16 and has_bf16_instructions()


def _check_storage(packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> None:
    if (len(packed), len(absmax)) != nf4_sizes(*shape) or packed.ndim != 1 or absmax.ndim != 1:
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
    """Finds the codes nearest to at most `size` values in [-1, 1], as `torch.bucketize` does, several times faster.

    A grid stands in for the search. Each of its cells has one midpoint nearest to it, and no other is near any value in
    the cell; so a value's code is that midpoint's number, plus 1 if the value is beyond it.
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


def _scale_back(values: torch.Tensor, absmax: torch.Tensor) -> None:
    whole = len(values) // NF4_BLOCK
    values[: whole * NF4_BLOCK].view(whole, NF4_BLOCK).mul_(absmax[:whole].unsqueeze(1))
    if len(values) % NF4_BLOCK:
        values[whole * NF4_BLOCK :].mul_(absmax[whole])


def _linear_bitsandbytes(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    multiple = nf4_rows_to_a_block(shape[1])
    tokens = rows_of(x, shape[1])

    def product(rows: slice) -> torch.Tensor:
        here, there = _storage_of(rows, shape[1])
        count = rows.stop - rows.start
        long_rows = (count // multiple, shape[1] * multiple) if count % multiple == 0 else (count, shape[1])
        block = operations().dequantize_4bit(packed[here], absmax[there], NF4_BLOCK, "nf4", long_rows, x.dtype)
        return torch.nn.functional.linear(tokens, block.view(count, shape[1]))

    return linear_by_parts(tokens, shape, product, multiple).view(*x.shape[:-1], shape[0])


def quantise_tiled(weight: torch.Tensor, tiles: torch.Tensor, absmax: torch.Tensor) -> None:
    """Quantise a matrix as `quantise_nf4` does, and put the codes in tiles; takes about 12 MiB of scratch memory.

    Written are `tiles`, uint8 `[out / f / 32, f × in / 2, 32]`, and `absmax`, bfloat16 `[f × in / 64, out / f]`.
    """
    shape = (weight.shape[0], weight.shape[1])
    for rows, codes, scales in quantised_blocks(weight, _rows_of_a_tile(shape)):
        there, columns = _places(rows, shape)
        tile(codes, tiles[there])
        absmax[:, columns] = scales.view(-1, absmax.shape[0]).T


def tile(codes: torch.Tensor, tiles: torch.Tensor) -> None:
    """Put codes, uint8 `[count]`, one a byte, row after row, in as many tiles, uint8 `[tiles, pairs, 32]`."""
    count, pairs, _ = tiles.shape
    low, high = codes.view(count, 2, NF4_TILE_ROWS // 2, 2 * pairs).unbind(1)
    # The two bytes of a pair of columns move as one.
    both = (high << 4).bitwise_or_(low).view(torch.int16)
    tiles.view(torch.int16).copy_(both.transpose(1, 2))


def untile(tiles: torch.Tensor) -> torch.Tensor:
    """Return the codes of tiles `[tiles, pairs, 32]` row after row, two a byte, flat."""
    count, pairs, _ = tiles.shape
    both = tiles.view(torch.int16).transpose(1, 2).contiguous().view(torch.uint8)
    first, second = both.view(count, NF4_TILE_ROWS // 2, pairs, 2).unbind(-1)
    upper = (first << 4).bitwise_or_(second & 0x0F)
    lower = (first & 0xF0).bitwise_or_(second >> 4)
    return torch.stack([upper, lower], dim=1).view(-1)


def linear_tiled(x: torch.Tensor, tiles: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Multiply with a matrix in tiles, as `quantise_tiled` writes it: `x @ weight.T`.

    A few rows in bfloat16 are multiplied by bitsandbytes where it can; else the codes are brought in the order of
    `linear_nf4`, which multiplies. CUDA has not been run yet. `x` and the result are as for `linear_nf4`.
    """
    tokens = rows_of(x, shape[1])
    few = 0 < len(tokens) <= _MOST_ROWS
    if few and x.device.type == "cpu" and bitsandbytes_unpacks(x.dtype) and tiled_product_works():
        return _tiled_product(tokens, tiles, absmax, shape).view(*x.shape[:-1], shape[0])

    def product(rows: slice) -> torch.Tensor:
        there, columns = _places(rows, shape)
        scales = absmax[:, columns].T.float().reshape(-1)
        return linear_nf4(tokens, untile(tiles[there]), scales, (rows.stop - rows.start, shape[1]))

    return linear_by_parts(tokens, shape, product, _rows_of_a_tile(shape)).view(*x.shape[:-1], shape[0])


@cache
def tiled_product_works() -> bool:
    """Try bitsandbytes' product on a small matrix: only some processors have it, and nothing promises its order."""
    generator = torch.Generator().manual_seed(0)
    shape = (2 * NF4_TILE_ROWS, 3 * NF4_BLOCK // 2)
    codes = torch.randint(16, (shape[0] * shape[1],), dtype=torch.uint8, generator=generator)
    scales = torch.rand(len(codes) // NF4_BLOCK, generator=generator).bfloat16()
    packed = torch.empty(len(codes) // 2, dtype=torch.uint8)
    tiles = torch.empty(1, shape[1], NF4_TILE_ROWS, dtype=torch.uint8)
    pack(codes, packed)
    tile(codes, tiles)
    x = torch.randn(5, shape[1], generator=generator).bfloat16()
    wanted = linear_nf4(x.float(), packed, scales.float(), shape)
    try:
        found = _tiled_product(x, tiles, scales.view(NF4_TILE_ROWS, -1).T.contiguous(), shape)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return bool((found - wanted).norm() < 0.02 * wanted.norm())


def _tiled_product(x: torch.Tensor, tiles: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Return `[rows, out]` for `[rows, in]`."""
    out, length = shape
    f = nf4_rows_to_a_block(length)
    if f > 1:
        parts = x.new_zeros(len(x), f, f, length)
        parts.diagonal(dim1=1, dim2=2).copy_(x.unsqueeze(-1))
        x = parts.view(len(x) * f, f * length)
    x = x.contiguous()
    result: torch.Tensor = operations().gemv_4bit(x, tiles, (out // f, f * length), absmax, _values(), NF4_BLOCK)
    result.addmm_(x.view(len(x), -1, NF4_BLOCK).sum(-1), absmax, alpha=-_LARGER_ON_AVERAGE)
    return result.view(-1, f, out // f).transpose(1, 2).reshape(-1, out)


@cache
def _values() -> torch.Tensor:
    return torch.tensor(NF4_VALUES)


def _rows_of_a_tile(shape: tuple[int, int]) -> int:
    return NF4_TILE_ROWS * nf4_rows_to_a_block(shape[1])


def _places(rows: slice, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Which tiles, and which columns of absmax, hold some rows; they begin and end a tile."""
    f = nf4_rows_to_a_block(shape[1])
    columns = slice(rows.start // f, rows.stop // f)
    return slice(columns.start // NF4_TILE_ROWS, columns.stop // NF4_TILE_ROWS), columns
