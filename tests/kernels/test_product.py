"""The products give what torch's own give, whichever way they take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from switchrun.kernels import blocks, native, plain

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, params=["", "off"], ids=["in C", "in torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHRUN_KERNELS", request.param)


@pytest.fixture(autouse=True)
def every_weight_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_LARGE_WEIGHT", 0)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)  # blocks of 64 rows, the last one shorter


@pytest.mark.parametrize("bfloat16_known", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 33, 127, 128, 150])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (96, 33), (130, 64)])
def test_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, shape: tuple[int, int], bfloat16_known: bool
) -> None:
    for module in (plain, blocks):
        monkeypatch.setattr(module, "has_bf16_instructions", lambda: bfloat16_known)
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, shape[1], generator=generator), torch.randn(*shape, generator=generator)
    got = plain.linear(x.to(dtype), weight.to(dtype))
    assert got.dtype is dtype
    # In bfloat16 both round once, from sums in different order.
    torch.testing.assert_close(got, nn.functional.linear(x.to(dtype), weight.to(dtype)), rtol=1e-2, atol=1e-2)
    exact = nn.functional.linear(x.to(dtype).double(), weight.to(dtype).double())
    tolerance = 2e-5 if dtype is torch.float32 else 2**-8
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=2e-5)


@pytest.mark.parametrize(("rows", "bfloat16_known"), [(1, False), (1, True), (24, True), (200, True)])
def test_a_row_in_bfloat16_and_all_where_torch_is_fast_are_multiplied_by_plain_torch(
    monkeypatch: pytest.MonkeyPatch, rows: int, bfloat16_known: bool
) -> None:
    monkeypatch.setattr(plain, "has_bf16_instructions", lambda: bfloat16_known)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 130, generator=generator).bfloat16() for n in (rows, 96))
    assert torch.equal(plain.linear(x, weight), nn.functional.linear(x, weight))


@pytest.mark.parametrize("rows", [2, 24, 32])
def test_few_rows_in_bfloat16_are_multiplied_in_c_where_torch_is_slow(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """From float32 sums, rounded once: what torch gives, but where a sum is next to the middle of two values."""
    if not native.available():
        pytest.skip("no kernels")
    monkeypatch.setattr(plain, "has_bf16_instructions", lambda: False)
    monkeypatch.setattr(blocks, "has_bf16_instructions", lambda: False)
    monkeypatch.setattr(plain, "linear_by_blocks", None)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 130, generator=generator).bfloat16() for n in (rows, 96))
    exact = x.double() @ weight.double().T
    found = plain.linear(x, weight)
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


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
