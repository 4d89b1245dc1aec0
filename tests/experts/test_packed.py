"""Packed experts: views of a slot, quantising into them, and their bytes against bfloat16's."""

from __future__ import annotations

import pytest
import torch

from switchrun.experts.buffers import Buffers
from switchrun.experts.formats import packed_views
from switchrun.kernels.matrices import (
    ExpertWeights,
    Int8Matrix,
    Nf4Matrix,
    moved,
    multiply,
    quantise,
)
from switchrun.store.layout import layout_of

#: Of an expert in bfloat16; the issue's bounds.
MOST = {"int8": 0.52, "nf4": 0.28}


@pytest.mark.parametrize(("dtype", "error"), [("int8", 0.02), ("nf4", 0.15)])
@pytest.mark.parametrize(("d_model", "d_ff"), [(96, 192), (96, 160), (20, 33)])
def test_a_quantised_expert_multiplies_nearly_as_before(dtype: str, error: float, d_model: int, d_ff: int) -> None:
    torch.manual_seed(0)
    layout = layout_of(dtype, d_model, d_ff)
    buffers = Buffers(2, -(-layout.nbytes // 4096) * 4096)
    stored = ExpertWeights(torch.randn(d_ff, d_model), torch.randn(d_ff, d_model).T)
    into = packed_views(buffers[1], layout, dtype, (d_ff, d_model))
    quantise(stored, into)
    x, hidden = torch.randn(3, d_model), torch.randn(3, d_ff)
    for given, plain, packed in ((x, stored.wi, into.wi), (hidden, stored.wo, into.wo)):
        assert isinstance(plain, torch.Tensor)
        wanted = given @ plain.T
        found = multiply(given, packed)
        assert ((found - wanted).norm() / wanted.norm()).item() < error
        assert multiply(given.bfloat16(), packed).dtype == torch.bfloat16
    assert not any(buffers[0].data)


@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize(("d_model", "d_ff"), [(2080, 6144), (768, 3072)])
def test_a_packed_expert_has_the_promised_share_of_bfloat16(dtype: str, d_model: int, d_ff: int) -> None:
    assert layout_of(dtype, d_model, d_ff).nbytes <= MOST[dtype] * (2 * 2 * d_model * d_ff)


def test_a_packed_matrix_is_moved_part_by_part() -> None:
    int8 = Int8Matrix(torch.zeros(2, 3, dtype=torch.int8), torch.ones(2))
    nf4 = Nf4Matrix(torch.zeros(3, dtype=torch.uint8), torch.ones(1, dtype=torch.bfloat16), (2, 3))
    for matrix in (int8, nf4):
        there = moved(ExpertWeights(matrix, matrix), lambda tensor: tensor.to("meta"))
        for found in (there.wi, there.wo):
            assert type(found) is type(matrix)
            parts = {name: getattr(found, name) for name in matrix.__slots__}
            assert {part.device.type for part in parts.values() if isinstance(part, torch.Tensor)} == {"meta"}
            assert parts.get("shape") == getattr(matrix, "shape", None)


def test_only_packed_dtypes_have_a_layout() -> None:
    with pytest.raises(ValueError, match="bf16"):
        layout_of("bf16", 4, 4)
