"""Work over a matrix a few rows at a time, so that what is unpacked from it never leaves the processor's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import torch

#: Elements of a block: 2 MiB once they are float32. Smaller blocks pay more for starting threads than they save.
BLOCK_ELEMENTS = 512 * 1024

#: The same where blocks are multiplied: several threads work on some, and each wait for one another costs more.
_PRODUCT_ELEMENTS = 1024 * 1024

#: The same where parts take turns, each with all threads; 4 MiB in bfloat16. Smaller ones cost more calls, larger ones
#: memory.
_PART_ELEMENTS = 2 * 1024**2

#: Threads that multiply a matrix; each has scratch memory of its own.
MOST_WORKERS = 4

#: Writes some rows of a matrix into a flat float32 buffer.
Unpack = Callable[[slice, torch.Tensor], None]


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


def largest_block(shape: tuple[int, int], multiple: int = 1, elements: int = BLOCK_ELEMENTS) -> int:
    """Tell how many elements a block of `row_blocks` has at most: scratch memory is taken once, not for each block.

    Memory that was just taken from the system costs more to touch than the arithmetic done in it.
    """
    return min(shape[0], _rows_in_a_block(shape[1], multiple, elements)) * shape[1]


def _rows_in_a_block(length: int, multiple: int, elements: int) -> int:
    return max(1, elements // max(1, length * multiple)) * multiple


def linear_by_blocks(
    x: torch.Tensor, shape: tuple[int, int], unpacker: Callable[[int], Unpack], multiple: int = 1
) -> torch.Tensor:
    """Multiply with a packed matrix that is unpacked block by block; all arithmetic is float32.

    On a CPU a few threads take every second, third or fourth block: what torch does to unpack one is in part the work
    of a single core. Each takes up to 6 MiB of scratch memory.

    Args:
        x: `[..., in]`, of any floating dtype.
        shape: `(out, in)` of the matrix.
        unpacker: Gives for the most elements of a block a function that writes the given rows of the matrix into a flat
            float32 buffer of as many elements; called once for each thread.
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
    blocks = list(row_blocks(shape, multiple, _PRODUCT_ELEMENTS))
    largest = largest_block(shape, multiple, _PRODUCT_ELEMENTS)

    def work(share: list[slice]) -> None:
        unpack, buffer = unpacker(largest), torch.empty(largest, device=x.device)
        for rows in share:
            block = buffer[: (rows.stop - rows.start) * in_features]
            unpack(rows, block)
            torch.mm(tokens, block.view(-1, in_features).T, out=result[:, rows])

    workers = min(MOST_WORKERS, torch.get_num_threads(), len(blocks)) if x.device.type == "cpu" else 1
    others = [_helpers().submit(work, blocks[first::workers]) for first in range(1, workers)]
    try:
        work(blocks[::workers])
    finally:
        wait(others)  # whatever happens here, they write into `result`
    for other in others:
        other.result()
    return result.view(*x.shape[:-1], out_features)


def linear_by_parts(
    x: torch.Tensor, shape: tuple[int, int], product: Callable[[slice], torch.Tensor], multiple: int = 1
) -> torch.Tensor:
    """Multiply with a packed matrix part by part, one after another, in the dtype of `x`.

    Args:
        x: `[..., in]`.
        shape: `(out, in)` of the matrix.
        product: Gives `x @ weight[rows].T` for some rows.
        multiple: As for `row_blocks`.

    Returns:
        `[..., out]`.
    """
    result = x.new_empty(*x.shape[:-1], shape[0])
    for rows in row_blocks(shape, multiple, _PART_ELEMENTS):
        result[..., rows] = product(rows)
    return result


@cache
def _helpers() -> ThreadPoolExecutor:
    """Threads that share the blocks with the model's; as many as ever work at once, so that nobody waits for one."""
    return ThreadPoolExecutor(MOST_WORKERS - 1, thread_name_prefix="switchrun-unpack")
