"""The products give what torch's own give, whichever way they take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from switchrun.kernels import plain

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def every_weight_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_LARGE_WEIGHT", 0)
    monkeypatch.setattr(plain, "_WIDEN_ROWS", 40)  # several parts, the last one shorter


@pytest.mark.parametrize("bfloat16_known", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 32, 33, 49])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (96, 33), (130, 64)])
def test_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, shape: tuple[int, int], bfloat16_known: bool
) -> None:
    monkeypatch.setattr(plain, "has_bf16_instructions", lambda: bfloat16_known)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, shape[1], generator=generator), torch.randn(*shape, generator=generator)
    got = plain.linear(x.to(dtype), weight.to(dtype))
    assert got.dtype is dtype
    # In bfloat16 both round once, from sums in different order.
    torch.testing.assert_close(got, nn.functional.linear(x.to(dtype), weight.to(dtype)), rtol=1e-2, atol=1e-2)
    exact = nn.functional.linear(x.to(dtype).double(), weight.to(dtype).double())
    tolerance = 2e-5 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 24, 32])
def test_a_sentence_in_bfloat16_is_multiplied_as_plain_torch_does(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 130, generator=generator).bfloat16() for n in (rows, 96))
    assert torch.equal(plain.linear(x, weight), nn.functional.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transposed_weight_and_inputs_of_any_shape(dtype: torch.dtype) -> None:
    layer = nn.Linear(5, 64, bias=False, dtype=dtype)
    layer.weight = nn.Parameter(torch.randn(5, 64).to(dtype).t(), requires_grad=False)
    x = torch.randn(2, 3, 5).to(dtype)
    expected = layer(x)
    plain.use_fast_products(layer)
    assert type(layer) is plain.Linear
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-2, atol=1e-2)
        assert layer(x).shape == (2, 3, 64)


def test_layers_of_other_kinds_are_let_be() -> None:
    class Other(nn.Linear):
        pass

    model = nn.Sequential(Other(2, 2), nn.Linear(2, 2), nn.ReLU())
    plain.use_fast_products(model)
    assert [type(module) for module in model] == [Other, plain.Linear, nn.ReLU]


def test_a_bias_is_added() -> None:
    layer = nn.Linear(3, 2)
    expected = layer(torch.ones(4, 3))
    plain.use_fast_products(layer)
    torch.testing.assert_close(layer(torch.ones(4, 3)), expected)
