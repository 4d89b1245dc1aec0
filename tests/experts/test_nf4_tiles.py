"""NF4 in tiles: bitsandbytes' own order, the very codes of the other order, and a product that is right either way."""

from __future__ import annotations

import platform
from types import SimpleNamespace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchrun.kernels import nf4
from switchrun.kernels.nf4 import (
    NF4_VALUES,
    linear_tiled,
    quantise_nf4,
    quantise_tiled,
    tile,
    tiled_product_works,
    untile,
)
from switchrun.machine import processor
from switchrun.store.layout import NF4_BLOCK, NF4_TILE_ROWS, nf4_layout, nf4_rows_to_a_block, nf4_sizes
from tests.experts.test_nf4 import by_hand

#: Rows that are whole blocks, and rows of which two are; one and several blocks of rows.
SHAPES = [(32, 64), (96, 128), (64, 96), (128, 2080), (160, 6144), (4160, 352)]


def tiled(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise as a slot of that layout would have it."""
    rows, length = weight.shape
    layout = nf4_layout(length, rows, tiled=True)
    assert len(layout["wi.weight"].shape) == 3
    tiles = torch.full(layout["wi.weight"].shape, 0xAA, dtype=torch.uint8)
    absmax = torch.full(layout["wi.absmax"].shape, -1.0, dtype=torch.bfloat16)
    quantise_tiled(weight, tiles, absmax)
    return tiles, absmax


def in_order(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales = nf4_sizes(*weight.shape)
    packed, absmax = torch.empty(codes, dtype=torch.uint8), torch.empty(scales)
    quantise_nf4(weight, packed, absmax)
    return packed, absmax.bfloat16()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_the_other_order(shape: tuple[int, int], transposed: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape[::-1]).T if transposed else torch.randn(shape)
    tiles, absmax = tiled(weight)
    packed, scales = in_order(weight)
    assert torch.equal(untile(tiles), packed)
    assert torch.equal(absmax.T.reshape(-1), scales)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_is_that_of_bitsandbytes(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape)
    f = nf4_rows_to_a_block(shape[1])
    theirs, state = bnb._convert_weight_packed_for_cpu(
        *bnb.quantize_4bit(weight.view(shape[0] // f, -1), blocksize=NF4_BLOCK, quant_type="nf4")
    )
    tiles, absmax = tiled(weight)
    assert torch.equal(tiles.view(-1), theirs.view(-1))
    assert torch.equal(absmax, state.absmax)


@settings(max_examples=50, deadline=None)
@given(count=st.integers(1, 5), pairs=st.integers(2, 70), seed=st.integers(0, 2**31))
def test_taking_codes_out_of_tiles_undoes_it(count: int, pairs: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (count * NF4_TILE_ROWS * 2 * pairs,), dtype=torch.uint8, generator=generator)
    tiles = torch.empty(count, pairs, NF4_TILE_ROWS, dtype=torch.uint8)
    tile(codes, tiles)
    packed = untile(tiles)
    assert torch.equal(torch.stack([packed >> 4, packed & 15], dim=1).view(-1), codes)


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_that_of_a_dequantisation_by_hand(
    shape: tuple[int, int], dtype: torch.dtype, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not works:
        monkeypatch.setattr(nf4, "tiled_product_works", lambda: False)
    elif dtype is torch.bfloat16 and not tiled_product_works():
        pytest.skip("bitsandbytes has no such product for this processor")
    torch.manual_seed(shape[1])
    weight = torch.randn(shape)
    tiles, absmax = tiled(weight)
    packed, scales = in_order(weight)
    exact = by_hand(packed, scales.float(), shape).double()
    for tokens in (0, 1, 3, 8, 33, 129):
        x = torch.randn(tokens, shape[1]).to(dtype)
        result = linear_tiled(x, tiles, absmax, shape)
        reference = x.double() @ exact.T
        each = 2**-8 if dtype == torch.bfloat16 else 1e-6
        allowed = torch.finfo(dtype).eps * reference.abs() + each * (x.double().abs() @ exact.T.abs()) + 1e-6
        assert result.dtype == dtype
        assert result.shape == (tokens, shape[0])
        assert ((result.double() - reference).abs() <= allowed).all()
        assert torch.equal(result, linear_tiled(x, tiles, absmax, shape))


@pytest.mark.parametrize("shape", [(4160, 2080), (2080, 6144)])
def test_what_is_rounded_does_not_add_up(shape: tuple[int, int]) -> None:
    """The values as bitsandbytes rounds them, alone, would be off by 0.012 and 0.02 after ReLU."""
    torch.manual_seed(2)
    weight = torch.randn(shape)
    tiles, absmax = tiled(weight)
    packed, scales = in_order(weight)
    exact = by_hand(packed, scales.float(), shape)
    for x in (torch.randn(4, shape[1]).bfloat16(), torch.randn(4, shape[1]).relu().bfloat16()):
        wanted = x.float() @ exact.T
        assert ((linear_tiled(x, tiles, absmax, shape).float() - wanted).norm() / wanted.norm()).item() < 0.004


def test_more_dimensions() -> None:
    torch.manual_seed(4)
    tiles, absmax = tiled(torch.randn(96, 128))
    x = torch.randn(3, 2, 128).bfloat16()
    result = linear_tiled(x, tiles, absmax, (96, 128))
    assert result.shape == (3, 2, 96)
    assert torch.equal(result.view(6, 96), linear_tiled(x.view(6, 128), tiles, absmax, (96, 128)))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="bitsandbytes has this product for AVX-512 only")
def test_the_product_is_there_where_the_processor_has_the_instructions() -> None:
    assert tiled_product_works() == processor.has_bf16_instructions()


def gives_zeros(x: torch.Tensor, _codes: object, shape: tuple[int, int], *_: object) -> torch.Tensor:
    return x.new_zeros(len(x), shape[0])


def raises(*_: object) -> torch.Tensor:
    raise NotImplementedError


@pytest.mark.parametrize("product", [gives_zeros, raises])
def test_a_product_that_is_wrong_or_not_there_is_not_used(product: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = nf4.operations()
    fake = SimpleNamespace(gemv_4bit=product, dequantize_4bit=real.dequantize_4bit)
    monkeypatch.setattr(nf4, "operations", lambda: fake)
    monkeypatch.setattr(nf4, "tiled_product_works", tiled_product_works.__wrapped__)
    assert not nf4.tiled_product_works()
    torch.manual_seed(3)
    weight = torch.randn(64, 96)
    tiles, absmax = tiled(weight)
    x = torch.randn(2, 96).bfloat16()
    wanted = x.float() @ by_hand(*in_order(weight), (64, 96)).T
    assert (linear_tiled(x, tiles, absmax, (64, 96)).float() - wanted).norm() / wanted.norm() < 0.01


def test_a_row_of_another_length_is_refused() -> None:
    tiles, absmax = tiled(torch.randn(32, 64))
    with pytest.raises(ValueError, match="a row of x has 32 elements, a row of the matrix 64"):
        linear_tiled(torch.randn(2, 32), tiles, absmax, (32, 64))


@pytest.mark.parametrize(
    ("d_model", "d_ff", "wi", "wo"),
    [
        (2080, 6144, (96, 2080, 32), (65, 3072, 32)),  # switch-c: two rows of wi are 65 blocks
        (768, 3072, (96, 384, 32), (24, 1536, 32)),  # base
        (96, 96, (48 * 96,), (48 * 96,)),  # 96 rows are 48 pairs of rows, one tile and a half
        (48, 6144, (48 * 6144 // 2,), (48 * 6144 // 2,)),  # four rows of wi to a block; wo has 48 rows
        (64, 100, (3200,), (3200,)),
    ],
)
def test_matrices_lie_in_tiles_where_they_are_whole_tiles(
    d_model: int, d_ff: int, wi: tuple[int, ...], wo: tuple[int, ...]
) -> None:
    layout, plain = nf4_layout(d_model, d_ff, tiled=True), nf4_layout(d_model, d_ff)
    assert (layout["wi.weight"].shape, layout["wo.weight"].shape) == (wi, wo)
    assert [part.nbytes for part in layout.tensors] == [part.nbytes for part in plain.tensors]


def test_the_values_are_the_papers() -> None:
    """`gemv_4bit` tells NF4 from FP4 by its second value."""
    assert NF4_VALUES[1] < 0
