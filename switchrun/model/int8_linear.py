"""Linear layers outside the experts in int8, for attention and the MLPs of blocks without experts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from switchrun.experts.int8 import linear_int8


class Int8Linear(nn.Module):
    """A linear layer without a bias whose weight is in LLM.int8's row-wise form; its tensors begin on the meta device.

    Its parameters have the names that bitsandbytes gives them. transformers looks at the dtype of `weight` and leaves
    hidden states as they are if that is int8.

    Args:
        in_features: The length of a row.
        out_features: The number of rows.

    Attributes:
        weight: int8 `[out, in]`.
        SCB: float32 `[out]`, the largest magnitude of each row.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        codes = torch.empty(out_features, in_features, dtype=torch.int8, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.SCB = nn.Parameter(torch.empty(out_features, device="meta"), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Give `[…, out]` for `[…, in]`, in the dtype of `x`."""
        return linear_int8(x, self.weight, self.SCB)


def use_int8(model: nn.Module, weights: Iterable[str]) -> None:
    """Put an `Int8Linear` in the place of each linear layer that is named by its weight."""
    for name in weights:
        path = name.removesuffix(".weight")
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(path, Int8Linear(linear.in_features, linear.out_features))
