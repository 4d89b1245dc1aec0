"""Matrices in 4 bit: bitsandbytes' own bytes, and a product that is right whatever the length of a row."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from switchrun.kernels import blocks
from switchrun.kernels.nf4 import NF4_VALUES, linear_nf4, quantise_nf4
from switchrun.store.layout import NF4_BLOCK, nf4_sizes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROW_LENGTHS = [1, 2, 31, 63, 64, 65, 96, 100, 128, 130, 2048, 2080, 2112, 6144]


@pytest.fixture(autouse=True, params=["", "off"], ids=["in C", "in torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHRUN_KERNELS", request.param)


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = nf4_sizes(*weight.shape)
    packed, absmax = torch.full((codes,), 0xAA, dtype=torch.uint8), torch.full((scales,), -1.0)
    quantise_nf4(weight, packed, absmax)
    return packed, absmax


def same_as_bitsandbytes(weight: torch.Tensor) -> bool:
    packed, absmax = quantised(weight)
    theirs, state = bnb.quantize_4bit(weight.contiguous(), blocksize=64, quant_type="nf4", compress_statistics=False)
    return torch.equal(packed, theirs.view(-1)) and torch.equal(
        absmax.view(torch.int32), state.absmax.view(torch.int32)
    )


def stored(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Give codes and scales as an expert has them."""
    packed, absmax = quantised(weight)
    return packed, absmax.bfloat16()


def by_hand(packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Dequantise element by element, with nothing of the code under test."""
    elements = shape[0] * shape[1]
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:elements]
    values = torch.tensor(NF4_VALUES)[codes.long()]
    return (values * absmax.float().repeat_interleave(NF4_BLOCK)[:elements]).view(shape)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    length=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-7, 0.02, 1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
def test_bytes_are_those_of_bitsandbytes(rows: int, length: int, dtype: torch.dtype, scale: float, seed: int) -> None:
    weight = (torch.randn(rows, length, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    assert same_as_bitsandbytes(weight)


@pytest.mark.parametrize("length", ROW_LENGTHS)
def test_bytes_for_many_row_lengths(length: int) -> None:
    torch.manual_seed(length)
    assert same_as_bitsandbytes(torch.randn(67, length).bfloat16())


def test_bytes_of_several_blocks_of_rows_and_of_a_transposed_matrix() -> None:
    torch.manual_seed(1)
    weight = torch.randn(1000, 1301) * 0.03
    assert same_as_bitsandbytes(weight)
    assert same_as_bitsandbytes(weight.T)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, 1e-38, -2.0])
@pytest.mark.parametrize("length", [64, 70])
def test_blocks_of_one_value(value: float, length: int) -> None:
    assert same_as_bitsandbytes(torch.full((3, length), value))


def test_bytes_at_the_midpoints() -> None:
    values = torch.tensor(NF4_VALUES)
    midpoints = (values[:-1] + values[1:]) / 2
    nearby = [midpoints, torch.nextafter(midpoints, torch.tensor(2.0)), torch.nextafter(midpoints, torch.tensor(-2.0))]
    edges = torch.linspace(-1, 1, 256)
    # Every block holds a 1.0, so that its values are not scaled.
    inner = torch.cat([*nearby, edges, torch.nextafter(edges, torch.tensor(0.0)), values])
    padded = torch.nn.functional.pad(inner, (0, -len(inner) % 63)).view(-1, 63)
    assert same_as_bitsandbytes(torch.nn.functional.pad(padded, (1, 0), value=1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", ROW_LENGTHS)
@pytest.mark.parametrize("rows", [301, 320])  # blocks of 64 end where a row ends, at the latest after 64 of them
@pytest.mark.parametrize("bfloat16_known", [False, True])
def test_the_product_is_that_of_a_dequantisation_by_hand(
    monkeypatch: pytest.MonkeyPatch, bfloat16_known: bool, rows: int, length: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(blocks, "has_bf16_instructions", lambda: bfloat16_known)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64 * 2080 * 4)  # several blocks, the last one shorter
    torch.manual_seed(length)
    shape = (rows, length)
    packed, absmax = stored(torch.randn(shape))
    weight = by_hand(packed, absmax, shape).double()
    for tokens in (0, 1, 8, 33, 130):
        x = torch.randn(tokens, length).to(dtype)
        result = linear_nf4(x, packed, absmax, shape)
        reference = x.double() @ weight.T
        # In bfloat16 weights may be rounded too, and twice.
        each = 2**-8 if dtype == torch.bfloat16 else 1e-6
        allowed = torch.finfo(dtype).eps * reference.abs() + each * (x.double().abs() @ weight.T.abs()) + 1e-7
        assert result.dtype == dtype
        assert result.shape == (tokens, rows)
        assert ((result.double() - reference).abs() <= allowed).all()
        assert torch.equal(result, linear_nf4(x, packed, absmax, shape))


@pytest.mark.parametrize("shape", [(700, 2080), (300, 6144), (333, 1041)])
def test_the_error_is_that_of_nf4(shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    weight, x = torch.randn(shape) * 0.03, torch.randn(8, shape[1])
    packed, absmax = stored(weight)
    reference = x @ weight.T
    # 0.092 for normal weights in blocks of 64; a kernel that takes the wrong absmax makes 0.245.
    assert (linear_nf4(x, packed, absmax, shape) - reference).norm() / reference.norm() < 0.1


def test_more_dimensions_and_strides() -> None:
    torch.manual_seed(4)
    packed, absmax = stored(torch.randn(24, 40))
    x = torch.randn(40, 3, 2).permute(2, 1, 0)
    torch.testing.assert_close(
        linear_nf4(x, packed, absmax, (24, 40))[1, 2], linear_nf4(x[1, 2], packed, absmax, (24, 40))
    )


def test_what_does_not_fit_is_refused() -> None:
    packed, absmax = stored(torch.randn(4, 40))
    with pytest.raises(ValueError, match="a row of x has 5 elements"):
        linear_nf4(torch.randn(2, 5), packed, absmax, (4, 40))
    with pytest.raises(ValueError, match="do not fit"):
        linear_nf4(torch.randn(2, 41), packed, absmax, (4, 41))
    with pytest.raises(ValueError, match="absmax torch"):
        quantise_nf4(torch.randn(4, 40), packed, absmax)
