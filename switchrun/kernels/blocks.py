"""Products with many rows: a block of the matrix at a time is unpacked, which torch then multiplies.

A product in C (`native`) unpacks weights in registers, again for every few rows of `x`. From so many rows on, torch's
product makes up for writing what is unpacked to memory. Measured with torch 2.13 on two cores of an Intel Xeon with
AVX-512 and AMX, 6144 × 2080 in nf4, other programs at work: in bfloat16 C takes 3.0, 4.4 and 6.0 ms for 8, 16 and 24
rows, a product by blocks 3.6 ms for each of them and 5.4 for 128. In float32, with AVX2, C takes 11.5 ms for 64 rows
and 22.5 for 128, by blocks it is 10.8 and 20.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from switchrun.kernels import native
from switchrun.machine.processor import has_bf16_instructions

#: From so many rows on blocks are faster: where torch multiplies in bfloat16, and in float32.
_MANY_BF16, _MANY = 16, 128
#: Of a block. A smaller one costs more calls.
BLOCK_BYTES = 7 * 1024**2
#: Writes some rows of a matrix to a tensor `[rows, in]`, in its dtype.
Unpack = Callable[[slice, torch.Tensor], object]


class _Scratch(threading.local):
    """Memory for a block, which each thread keeps.

    Taken anew for each product, it left holes in malloc's heap that what libraries keep made too small for the next:
    batches of 30 lines in nf4 came to 340 MiB more than they needed.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def block(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        size = rows * columns * dtype.itemsize
        if len(self._memory) < size:
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size].view(dtype).view(rows, columns)


_SCRATCH = _Scratch()


def rows_of(x: torch.Tensor, length: int) -> torch.Tensor:
    """Return `x` `[..., in]` as `[rows, in]`; a `ValueError` if `in` is not the length of the matrix's rows."""
    if x.shape[-1] != length:
        raise ValueError(f"a row of x has {x.shape[-1]} elements, a row of the matrix {length}")
    return x.reshape(-1, length)


def is_for_native(x: torch.Tensor) -> bool:
    """Whether a product with `x` `[rows, in]` is fastest in C, as far as there are kernels."""
    many = _MANY_BF16 if _dtype_for(x) is torch.bfloat16 else _MANY
    return x.device.type == "cpu" and len(x) < many and native.available()


def linear_by_blocks(x: torch.Tensor, shape: tuple[int, int], unpack: Unpack) -> torch.Tensor:
    """Return `x @ weight.T` for `x` `[rows, in]` and a matrix `(out, in)`, in the dtype that it is multiplied in.

    `unpack` is asked for rows that begin at a multiple of 64.
    """
    dtype = _dtype_for(x)
    # What torch unpacks takes four times as much on the way.
    most = BLOCK_BYTES if native.available() else BLOCK_BYTES // 4
    step = max(1, most // (64 * max(1, shape[1]) * dtype.itemsize)) * 64
    columns = x.to(dtype).t()
    result = torch.empty(shape[0], len(x), dtype=dtype, device=x.device)
    size = min(step, shape[0]), shape[1]
    on_cpu = x.device.type == "cpu"
    block = _SCRATCH.block(*size, dtype) if on_cpu else torch.empty(size, dtype=dtype, device=x.device)
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        unpacked = block[: rows.stop - start]
        unpack(rows, unpacked)
        torch.mm(unpacked, columns, out=result[rows])
    return result.t()


def _dtype_for(x: torch.Tensor) -> torch.dtype:
    if x.is_cuda:
        return x.dtype
    narrow = x.dtype is torch.bfloat16 and x.device.type == "cpu" and has_bf16_instructions()
    return torch.bfloat16 if narrow else torch.float32
