"""Matrices in 4 bit, NF4 in blocks of 64, as bitsandbytes stores them (Dettmers et al. 2023, arXiv:2305.14314).

The matrix is taken as one long row. Every 64 elements share a scale, `absmax`, their largest magnitude, and each is the
nearest of 16 values in [-1, 1] times that. Two codes make a byte, the first in the high bits. A block may run from one
row into the next, which bitsandbytes 0.50.2's CPU kernels get wrong on some processors: they are not used.
"""

from __future__ import annotations

import torch

from switchrun.kernels import native
from switchrun.kernels.bitsandbytes_ops import operations
from switchrun.kernels.blocks import is_for_native, linear_by_blocks, rows_of
from switchrun.store.layout import NF4_BLOCK, nf4_sizes

#: The value of each code: quantiles of the normal distribution, from the paper's appendix E.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
#: The codes of two elements that are 0.0.
_TWO_ZEROS = 0x77
#: Elements that are quantised at a time, as far as 64 rows have no more.
_AT_A_TIME = 256 * 1024


def quantise_nf4(weight: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    """Quantise a matrix to the bytes of `bitsandbytes.functional.quantize_4bit(..., blocksize=64, quant_type="nf4")`.

    Takes 2 MiB of scratch memory, 8 without the C kernels. `weight` is `[out, in]`, floating, finite, on the CPU.
    Written are `packed`, uint8 `[ceil(out × in / 2)]`, and `absmax`, float32 `[ceil(out × in / 64)]`.
    """
    weight, length = weight.detach(), weight.shape[1]
    _check_storage(packed, absmax, (weight.shape[0], length), torch.float32)
    quantise = native.quantise_nf4 if native.available() else _quantise_by_torch
    rows = 64 * max(1, _AT_A_TIME // (64 * length))  # whole blocks, whatever the length
    pieces = [(weight, rows), (packed, rows * length // 2), (absmax, rows * length // NF4_BLOCK)]
    for some, codes, scales in zip(*(torch.split(tensor, size) for tensor, size in pieces), strict=True):
        quantise(some.float().contiguous().view(-1), codes, scales)


def linear_nf4(x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Multiply with a matrix in 4 bit: `x @ weight.T`. The same call gives the same bits.

    `x` is `[..., in]`, float32, bfloat16 or float16, the matrix `(out, in)` as `quantise_nf4` writes it, but `absmax`
    is bfloat16. The result is `[..., out]`, in the dtype of `x`. On CUDA, which has not been run yet, bitsandbytes
    unpacks.
    """
    _check_storage(packed, absmax, shape, torch.bfloat16)
    tokens = rows_of(x, shape[1])

    def unpack(rows: slice, to: torch.Tensor) -> None:
        if packed.device.type == "cpu" and native.available():
            native.unpack_nf4(packed, absmax, shape, rows, to)
            return
        begin, end = rows.start * shape[1], rows.stop * shape[1]
        codes = packed[begin // 2 : -(-end // 2)]
        scales = absmax[begin // NF4_BLOCK : -(-end // NF4_BLOCK)].float()
        if packed.is_cuda:
            flat = (1, end - begin)
            values: torch.Tensor = operations().dequantize_4bit(codes, scales, NF4_BLOCK, "nf4", flat, to.dtype)
        else:
            values = _unpack_by_torch(codes, scales)[: end - begin]
        to.copy_(values.view(-1, shape[1]))

    if is_for_native(tokens):
        result = native.linear_nf4(tokens, packed, absmax, shape)
    else:
        result = linear_by_blocks(tokens, shape, unpack)
    return result.to(x.dtype).view(*x.shape[:-1], shape[0])


def _check_storage(packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], scales: torch.dtype) -> None:
    if (len(packed), len(absmax)) != nf4_sizes(*shape) or packed.ndim != 1 or absmax.ndim != 1:
        raise ValueError(f"codes {list(packed.shape)} and absmax {list(absmax.shape)} do not fit {list(shape)}")
    if packed.dtype != torch.uint8 or absmax.dtype != scales:
        raise ValueError(f"codes must be uint8 and absmax {scales}, not {packed.dtype} and {absmax.dtype}")


def _quantise_by_torch(values: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    """Quantise as `nf4_quantise` does in C."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % NF4_BLOCK)).view(-1, NF4_BLOCK)
    largest = blocks.abs().amax(1)
    scaled = blocks * (1.0 / largest.clamp(min=1e-38)).unsqueeze(1)
    if len(values) % NF4_BLOCK:
        # As bitsandbytes has it: a block cut short is divided, and its absmax never 0.
        largest[-1].clamp_(min=1e-38)
        scaled[-1] = blocks[-1] / largest[-1]
    levels = torch.tensor(NF4_VALUES)
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8).view(-1, 2)
    packed.copy_((codes[:, 0] * 16 + codes[:, 1])[: len(packed)])
    absmax.copy_(largest)


def _unpack_by_torch(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the elements of some blocks in float32, flat, and zeros where the last block has none."""
    whole = torch.nn.functional.pad(codes, (0, len(scales) * NF4_BLOCK // 2 - len(codes)), value=_TWO_ZEROS)
    values = torch.tensor(NF4_VALUES, device=codes.device)
    # The two values of a byte as one float64: half as many to look up.
    pairs = torch.cartesian_prod(values, values).view(torch.float64).view(-1)
    found = torch.index_select(pairs, 0, whole.int()).view(torch.float32)
    return found.view(-1, NF4_BLOCK).mul_(scales.unsqueeze(1)).view(-1)
