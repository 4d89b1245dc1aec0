"""`x @ weight.T` on the CPU, by way of whichever kernel is fast: the stock call is slow for a few rows.

Measured with torch 2.13 on two Zen 3 cores, both matrices of an expert of 2080 × 6144 (`benchmarks/products.py`). MKL's
float32 product takes up to 1.6 times as long for `x @ weight.T` with 4 to 32 rows as for the same product the other way
round, `weight @ x.T`, with its columns padded. Where the processor has no bf16 instructions, torch's product in bf16
takes as long for each further row as for the first, 1.5 ms with AVX-512 and 3 to 5 with AVX2; a product in C, which
reads and widens each weight once for several rows, takes 0.1 and 0.2. A single row is as fast in torch.
"""

from __future__ import annotations

import torch
from torch import nn

from switchrun.kernels import native
from switchrun.kernels.blocks import is_for_native, linear_by_blocks
from switchrun.machine.processor import has_bf16_instructions

#: Smaller weights come from the processor's cache, and padding would cost more than it saves.
_LARGE_WEIGHT = 1 << 18
#: Columns of the right matrix are padded to a multiple of this.
_COLUMNS = 16


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return what `nn.functional.linear` returns, rounded once from a float32 sum.

    `x` `[rows, in]` and `weight` `[out, in]` are of one dtype and on one device; the result is `[rows, out]`.
    """
    rows = x.shape[0]
    if x.device.type == "cpu" and rows > 1 and weight.numel() >= _LARGE_WEIGHT:
        if x.dtype is torch.float32:
            return (weight @ _columns(x))[:, :rows].t()
        if x.dtype is torch.bfloat16 and not has_bf16_instructions():
            return _widened(x, weight)
    return nn.functional.linear(x, weight)


class Linear(nn.Linear):
    """A layer that multiplies by `linear`; takes inputs of any shape `[..., in]`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the base class calls it so
        """Return `[..., out]`."""
        if self.bias is not None:
            return super().forward(input)
        return linear(input.reshape(-1, input.shape[-1]), self.weight).view(*input.shape[:-1], -1)


def use_fast_products(model: nn.Module) -> None:
    """Have a model's linear layers multiply by `linear`, except those of subclasses, which have ways of their own."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear


def _widened(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if is_for_native(x) and weight.is_contiguous():
        return native.linear_bf16(x, weight).to(x.dtype)
    shape = (weight.shape[0], weight.shape[1])
    return linear_by_blocks(x, shape, lambda rows, to: to.copy_(weight[rows])).to(x.dtype)


def _columns(x: torch.Tensor) -> torch.Tensor:
    """Return `x.T`, zeros added to its right; column by column in memory, which MKL takes fastest."""
    padded = x.new_zeros(-(-x.shape[0] // _COLUMNS) * _COLUMNS, x.shape[1])
    padded[: x.shape[0]] = x
    return padded.t()
