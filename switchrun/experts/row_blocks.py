"""Work over a matrix a few rows at a time, so that what is unpacked from it never leaves the processor's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

#: Elements of a block: 2 MiB once they are float32. Smaller blocks pay more for starting threads than they save.
BLOCK_ELEMENTS = 512 * 1024


def row_blocks(shape: tuple[int, int], multiple: int = 1, elements: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Cut the rows of a matrix into blocks of about `elements` elements.

    Args:
        shape: `(rows, row length)`.
        multiple: Every block but the last has a multiple of so many rows.
        elements: How large a block should be.

    Yields:
        The rows of each block, in order.
    """
    step = _rows_in_a_block(shape[1], multiple, elements)
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def largest_block(shape: tuple[int, int], multiple: int = 1) -> int:
    """Tell how many elements a block of `row_blocks` has at most: scratch memory is taken once, not for each block.

    Memory that was just taken from the system costs more to touch than the arithmetic done in it.
    """
    return min(shape[0], _rows_in_a_block(shape[1], multiple, BLOCK_ELEMENTS)) * shape[1]


def _rows_in_a_block(length: int, multiple: int, elements: int) -> int:
    return max(1, elements // max(1, length * multiple)) * multiple


def linear_by_blocks(
    x: torch.Tensor, shape: tuple[int, int], unpack: Callable[[slice, torch.Tensor], None], multiple: int = 1
) -> torch.Tensor:
    """Multiply with a packed matrix that is unpacked block by block; all arithmetic is float32.

    Args:
        x: `[..., in]`, of any floating dtype.
        shape: `(out, in)` of the matrix.
        unpack: Writes the given rows of the matrix into a flat float32 buffer of as many elements.
        multiple: As for `row_blocks`.

    Returns:
        `[..., out]`, float32.

    Raises:
        ValueError: The last extent of `x` is not `in`.
    """
    out_features, in_features = shape
    if x.shape[-1] != in_features:
        raise ValueError(f"a row of x has {x.shape[-1]} elements, a row of the matrix {in_features}")
    tokens = x.reshape(-1, in_features).float()
    result = torch.empty(tokens.shape[0], out_features, device=x.device)
    buffer = torch.empty(largest_block(shape, multiple), device=x.device)
    for rows in row_blocks(shape, multiple):
        block = buffer[: (rows.stop - rows.start) * in_features]
        unpack(rows, block)
        torch.mm(tokens, block.view(-1, in_features).T, out=result[:, rows])
    return result.view(*x.shape[:-1], out_features)
