"""Products by blocks of rows: each row once, in blocks that the plan has memory for."""

from __future__ import annotations

import pytest
import torch

from switchrun.kernels import blocks
from switchrun.planning.memory import PRODUCT_SCRATCH_BYTES


@pytest.mark.parametrize("bfloat16_known", [False, True])
@pytest.mark.parametrize("shape", [(6144, 2080), (2080, 6144), (2048, 768)])
def test_blocks_of_an_expert_fit_what_the_plan_reserves(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], bfloat16_known: bool
) -> None:
    monkeypatch.setattr(blocks, "has_bf16_instructions", lambda: bfloat16_known)
    asked: list[int] = []

    def unpack(rows: slice, to: torch.Tensor) -> None:
        assert rows.start % 64 == 0
        asked.extend(range(rows.start, rows.stop))
        assert to.shape == (rows.stop - rows.start, shape[1])
        assert to.nbytes <= PRODUCT_SCRATCH_BYTES
        to.fill_(1)

    result = blocks.linear_by_blocks(torch.ones(2, shape[1]).bfloat16(), shape, unpack)
    assert asked == list(range(shape[0]))
    assert (result == shape[1]).all()
