"""Matrices in 8 bit, row-wise, as LLM.int8 stores them (Dettmers et al. 2022, arXiv:2208.07339).

A row is kept as int8 codes and one float32, `SCB`, its largest magnitude: `weight ≈ codes × SCB / 127`. These are the
bytes that bitsandbytes and transformers write as `weight` and `SCB`.

On a CPU the product is weight-only: activations are not quantised, so outliers among them need no care and the error
is smaller than that of LLM.int8 itself. `benchmarks/quantised.py` measures both.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from switchrun.kernels import native
from switchrun.kernels.bitsandbytes_ops import operations
from switchrun.kernels.blocks import is_for_native, linear_by_blocks, rows_of

#: LLM.int8's threshold: activations of this magnitude are outliers, multiplied in higher precision. GPU only.
OUTLIER_THRESHOLD = 6.0
#: Elements that are quantised at a time: what stays in the processor's cache is several times as fast.
_AT_A_TIME = 512 * 1024


def quantise_int8(weight: torch.Tensor, codes: torch.Tensor, scb: torch.Tensor) -> None:
    """Quantise a matrix row by row, to the codes of `bitsandbytes.functional.int8_vectorwise_quant`.

    bitsandbytes computes in float32 whatever the dtype, and so does this. It takes about 4 MiB of scratch memory.
    A row whose magnitudes are all zero, or too small for 127 / SCB to be finite, gets zero codes, as there.

    `weight` is `[out, in]`, floating, finite, on the CPU. Written are int8 `codes` and float32 `scb`, `[out]`.
    """
    if codes.shape != weight.shape or scb.shape != weight.shape[:1]:
        raise ValueError(f"codes {list(codes.shape)} and SCB {list(scb.shape)} do not fit {list(weight.shape)}")
    if codes.dtype != torch.int8 or scb.dtype != torch.float32:
        raise ValueError(f"codes must be int8 and SCB float32, not {codes.dtype} and {scb.dtype}")
    rows = max(1, _AT_A_TIME // max(1, weight.shape[1]))
    for some, into, largest in zip(*(torch.split(each, rows) for each in (weight.detach(), codes, scb)), strict=True):
        values = some.to(torch.float32, copy=True)
        # Two reductions are faster than abs and one, which writes the block once more. abs_ turns -0.0 into 0.0.
        largest.copy_(torch.maximum(values.amax(1), -values.amin(1)).abs_())
        scale = 127.0 / largest
        scale[scale.isinf()] = 0.0
        into.copy_(values.mul_(scale.unsqueeze(1)).round_())


def linear_int8(x: torch.Tensor, codes: torch.Tensor, scb: torch.Tensor) -> torch.Tensor:
    """Multiply with a matrix in 8 bit: `x @ weight.T`. The same call gives the same bits.

    On a CPU weights are unpacked and activations are left as they are. On CUDA this is bitsandbytes' LLM.int8, outliers
    included; that path has not been run yet.

    `x` is `[..., in]`, float32, bfloat16 or float16, the matrix as `quantise_int8` writes it, `codes` contiguous. The
    result is `[..., out]`, in the dtype of `x`.
    """
    out, length = codes.shape
    tokens = rows_of(x, length)
    if x.is_cuda:
        return _linear_bitsandbytes(x, codes, scb)

    def unpack(rows: slice, to: torch.Tensor) -> None:
        to.copy_(codes[rows])  # whole numbers up to 127: bfloat16 has them all

    if is_for_native(tokens):
        result = native.linear_int8(tokens, codes, scb)
    else:
        # Scaling the few results is cheaper than scaling the weights.
        result = linear_by_blocks(tokens, (out, length), unpack) * (scb / 127.0)
    return result.to(x.dtype).view(*x.shape[:-1], out)


def _linear_bitsandbytes(x: torch.Tensor, codes: torch.Tensor, scb: torch.Tensor) -> torch.Tensor:
    """LLM.int8 by bitsandbytes' own operations, as `Linear8bitLt` calls them: activations in int8, outliers apart."""
    tokens = x.reshape(-1, x.shape[-1])
    # What float16 cannot hold is an outlier, and those are multiplied as they are in `tokens`.
    x_codes, x_stats, outliers = operations().int8_vectorwise_quant(tokens.to(torch.float16), OUTLIER_THRESHOLD)
    result: torch.Tensor
    result, _ = operations().int8_mixed_scaled_mm(tokens, x_codes, codes, x_stats, scb, outliers)
    return result.view(*x.shape[:-1], codes.shape[0])


class Int8Linear(nn.Module):
    """A linear layer without a bias whose weight is in LLM.int8's row-wise form; its tensors begin on the meta device.

    Its parameters have the names that bitsandbytes gives them: `weight`, int8 `[out, in]`, and `SCB`, float32 `[out]`.
    transformers looks at the dtype of `weight` and leaves hidden states as they are if that is int8.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.SCB = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[..., out]` for `[..., in]`, in the dtype of `x`."""
        return linear_int8(x, self.weight, self.SCB)


def use_int8(model: nn.Module, weights: Iterable[str]) -> None:
    """Replace the linear layers with these weights' names by `Int8Linear`."""
    for name in weights:
        path = name.removesuffix(".weight")
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(path, Int8Linear(linear.in_features, linear.out_features))
