"""NF4 in tiles: the order of codes that bitsandbytes' product on CPUs with AVX-512 for bfloat16 wants.

That product (`gemv_4bit`, bitsandbytes 0.50) unpacks codes in registers and never writes a weight to memory: 0.5 ms for
an expert of switch-c and one token, where unpacking it first takes 3.6. It wants 32 rows beside one another: a tile
has the codes of 32 rows, 64 of two columns after one another, and the scales lie block by block, one for each row. It
also wants every row to begin a block of 64. Where rows end within one (2,080 is 32.5 blocks), `f` rows are taken as
one long row, and `x` is multiplied as `f` rows, each of them zero but for its own part.
"""

from __future__ import annotations

from functools import cache

import torch

from switchrun.kernels.bitsandbytes_ops import operations
from switchrun.kernels.nf4 import NF4_VALUES, bitsandbytes_unpacks, linear_nf4, pack, quantised_blocks
from switchrun.kernels.row_blocks import linear_by_parts
from switchrun.store.layout import NF4_BLOCK, NF4_TILE_ROWS, nf4_rows_to_a_block

#: The product rounds NF4's values to bfloat16; with the codes of normal weights, they are larger by so much on average
#: (of absmax). Where `x` has no zero mean, as after ReLU, that adds up: to 2 % of the result in `wo` of switch-c, where
#: NF4's own error is 10 %. So it is taken off again, which leaves 0.2 %.
_LARGER_ON_AVERAGE = 1.81e-4
#: The product unpacks codes anew for every few rows of `x`; above so many it is faster to do so once.
_MOST_ROWS = 128


def quantise_tiled(weight: torch.Tensor, tiles: torch.Tensor, absmax: torch.Tensor) -> None:
    """Quantise a matrix as `quantise_nf4` does, and put the codes in tiles; takes about 12 MiB of scratch memory.

    Args:
        weight: `[out, in]`, floating, finite, on the CPU; any strides.
        tiles: uint8 `[out / f / 32, f × in / 2, 32]`; written.
        absmax: bfloat16 `[f × in / 64, out / f]`; written.
    """
    shape = (weight.shape[0], weight.shape[1])
    for rows, codes, scales in quantised_blocks(weight, _rows_of_a_tile(shape)):
        there, columns = _places(rows, shape)
        tile(codes, tiles[there])
        absmax[:, columns] = scales.view(-1, absmax.shape[0]).T


def tile(codes: torch.Tensor, tiles: torch.Tensor) -> None:
    """Put codes in tiles.

    Args:
        codes: uint8, one code a byte, row after row.
        tiles: uint8 `[tiles, pairs, 32]` for as many codes; written.
    """
    count, pairs, _ = tiles.shape
    low, high = codes.view(count, 2, NF4_TILE_ROWS // 2, 2 * pairs).unbind(1)
    # The two bytes of a pair of columns move as one.
    both = (high << 4).bitwise_or_(low).view(torch.int16)
    tiles.view(torch.int16).copy_(both.transpose(1, 2))


def untile(tiles: torch.Tensor) -> torch.Tensor:
    """Give the codes of tiles `[tiles, pairs, 32]` row after row, two a byte, flat."""
    count, pairs, _ = tiles.shape
    both = tiles.view(torch.int16).transpose(1, 2).contiguous().view(torch.uint8)
    first, second = both.view(count, NF4_TILE_ROWS // 2, pairs, 2).unbind(-1)
    upper = (first << 4).bitwise_or_(second & 0x0F)
    lower = (first & 0xF0).bitwise_or_(second >> 4)
    return torch.stack([upper, lower], dim=1).view(-1)


def linear_tiled(x: torch.Tensor, tiles: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Multiply with a matrix in tiles: `x @ weight.T`.

    A few rows in bfloat16 are multiplied by bitsandbytes where it can; else the codes are brought in the order of
    `linear_nf4`, which multiplies. CUDA has not been run yet.

    Args:
        x: `[..., in]`, float32, bfloat16 or float16.
        tiles: uint8 `[out / f / 32, f × in / 2, 32]`.
        absmax: bfloat16 `[f × in / 64, out / f]`.
        shape: `(out, in)`.

    Returns:
        `[..., out]`, in the dtype of `x`.

    Raises:
        ValueError: A row of `x` has another length than one of the matrix.
    """
    if x.shape[-1] != shape[1]:
        raise ValueError(f"a row of x has {x.shape[-1]} elements, a row of the matrix {shape[1]}")
    rows_of_x = x.reshape(-1, shape[1])
    few = 0 < len(rows_of_x) <= _MOST_ROWS
    if few and x.device.type == "cpu" and bitsandbytes_unpacks(x.dtype) and product_works():
        return _product(rows_of_x, tiles, absmax, shape).view(*x.shape[:-1], shape[0])

    def product(rows: slice) -> torch.Tensor:
        there, columns = _places(rows, shape)
        scales = absmax[:, columns].T.float().reshape(-1)
        return linear_nf4(x, untile(tiles[there]), scales, (rows.stop - rows.start, shape[1]))

    return linear_by_parts(x, shape, product, _rows_of_a_tile(shape))


@cache
def product_works() -> bool:
    """Try bitsandbytes' product on a small matrix: it is there on some processors only, and nothing promises its order.

    Imports bitsandbytes.
    """
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
        found = _product(x, tiles, scales.view(NF4_TILE_ROWS, -1).T.contiguous(), shape)
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return bool((found - wanted).norm() < 0.02 * wanted.norm())


def _product(x: torch.Tensor, tiles: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Give `[rows, out]` for `[rows, in]`."""
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
    """Tell which tiles, and which columns of absmax, hold some rows; they begin and end a tile."""
    f = nf4_rows_to_a_block(shape[1])
    columns = slice(rows.start // f, rows.stop // f)
    return slice(columns.start // NF4_TILE_ROWS, columns.stop // NF4_TILE_ROWS), columns
