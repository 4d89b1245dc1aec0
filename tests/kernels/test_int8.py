"""Matrices in 8 bit: bitsandbytes' own codes, and a product that is no worse than its."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from switchrun.kernels import blocks
from switchrun.kernels.int8 import _linear_bitsandbytes, linear_int8, quantise_int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
many = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True, params=["", "off"], ids=["in C", "in torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHRUN_KERNELS", request.param)


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.full(weight.shape, 99, dtype=torch.int8)
    scb = torch.full((len(weight),), -1.0)
    quantise_int8(weight, codes, scb)
    return codes, scb


def relative_error(result: torch.Tensor, reference: torch.Tensor) -> float:
    return ((result.float() - reference).norm() / reference.norm()).item()


@many
@given(
    rows=st.integers(1, 70),
    length=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-7, 0.02, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_codes_are_those_of_bitsandbytes(rows: int, length: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    weight = (torch.randn(rows, length, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    theirs, stats, _ = bnb.int8_vectorwise_quant(weight.clone())
    codes, scb = quantised(weight)
    assert torch.equal(codes, theirs)
    assert torch.equal(scb, stats)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_several_blocks_of_rows_and_of_a_transposed_matrix(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = (torch.randn(2080, 700) * 0.03).to(dtype)
    for matrix in (weight, weight.T):
        theirs, stats, _ = bnb.int8_vectorwise_quant(matrix.contiguous())
        codes, scb = quantised(matrix)
        assert torch.equal(codes, theirs)
        assert torch.equal(scb, stats)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, 1e-37, -2.0])
def test_rows_of_one_value(value: float) -> None:
    weight = torch.full((3, 20), value)
    weight[1] = torch.linspace(-1, 1, 20)
    theirs, stats, _ = bnb.int8_vectorwise_quant(weight.clone())
    codes, scb = quantised(weight)
    assert torch.equal(codes, theirs)
    assert torch.equal(scb.view(torch.int32), stats.view(torch.int32))


def test_ties_are_rounded_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    assert quantised(weight)[0].tolist() == [[127, 0, 2, 2, 0, -2]]


@many
@given(
    tokens=st.sampled_from([0, 1, 2, 7, 15, 16, 33, 130]),
    out_features=st.integers(1, 80),
    in_features=st.integers(1, 300) | st.sampled_from([32, 64, 96, 2080]),
    dtype=st.sampled_from(DTYPES),
    bfloat16_known=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_product_is_that_of_the_dequantised_matrix(
    tokens: int, out_features: int, in_features: int, dtype: torch.dtype, bfloat16_known: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes, scb = quantised(torch.randn(out_features, in_features, generator=generator))
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(blocks, "has_bf16_instructions", lambda: bfloat16_known)
        patched.setattr(blocks, "BLOCK_BYTES", 1)  # blocks of 64 rows
        result = linear_int8(x, codes, scb)
    magnitude = x.double().abs() @ (codes.double().abs() * scb.double().unsqueeze(1) / 127).T
    reference = x.double() @ (codes.double() * scb.double().unsqueeze(1) / 127).T
    assert result.dtype == dtype
    assert result.shape == (tokens, out_features)
    # bfloat16 and float16: the result is rounded, in bfloat16 before it is scaled and after.
    allowed = torch.finfo(dtype).eps * reference.abs() + 1e-6 * magnitude + 1e-7
    assert ((result.double() - reference).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 8, 32])
@pytest.mark.parametrize("shape", [(768, 260), (260, 768), (333, 1041)])
def test_no_worse_than_bitsandbytes(dtype: torch.dtype, tokens: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(tokens)
    weight = torch.randn(shape) * 0.03
    x = torch.randn(tokens, shape[1])
    x[0, 5] = 40.0  # an outlier
    x = x.to(dtype)
    reference = x.float() @ weight.T
    codes, scb = quantised(weight)
    x_codes, stats, outliers = bnb.int8_vectorwise_quant(x.half(), threshold=6.0)
    theirs, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(x, x_codes, codes, stats, scb, outliers)
    ours = linear_int8(x, codes, scb)
    assert relative_error(ours, reference) <= relative_error(theirs, reference)
    assert relative_error(ours, reference) < 0.011
    assert torch.equal(ours, linear_int8(x, codes, scb))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_dimensions_and_strides(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    codes, scb = quantised(torch.randn(24, 40))
    x = torch.randn(40, 3, 2).to(dtype).permute(2, 1, 0)
    torch.testing.assert_close(linear_int8(x, codes, scb)[1, 2], linear_int8(x[1, 2], codes, scb))


def test_what_does_not_fit_is_refused() -> None:
    codes, scb = quantised(torch.randn(4, 6))
    with pytest.raises(ValueError, match="a row of x has 5 elements"):
        linear_int8(torch.randn(2, 5), codes, scb)
    with pytest.raises(ValueError, match="do not fit"):
        quantise_int8(torch.randn(4, 7), codes, scb)
    with pytest.raises(ValueError, match="SCB float32"):
        quantise_int8(torch.randn(4, 6), codes, scb.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [0.0, 1e-3, 1.0, 1e5, 1e12])
def test_the_way_of_cuda_takes_activations_that_float16_cannot_hold(dtype: torch.dtype, magnitude: float) -> None:
    """By bitsandbytes' operations for the CPU, which have the same names."""
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64), (torch.randn(5, 64) * magnitude).to(dtype)
    x[0] *= 1000
    found = _linear_bitsandbytes(x, *quantised(weight))
    assert found.dtype == dtype
    if magnitude:
        for row, wanted in zip(found, x.float() @ weight.T, strict=True):
            assert relative_error(row, wanted) < 0.02
    else:
        assert not found.any()
