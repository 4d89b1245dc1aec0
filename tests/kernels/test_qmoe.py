"""Ternary matrices as the engine multiplies with them: by the C kernels, or by torch alone, which must agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from switchrun.errors import CorruptCheckpointError
from switchrun.kernels import native, qmoe
from switchrun.kernels.qmoe import QmoeMatrix

pytestmark = pytest.mark.skipif(not native.paths(), reason="built without kernels, by which matrices are encoded")
few = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_matrix(seed: int, rows: int, columns: int, zeros: float = 0.885) -> QmoeMatrix:
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(rows, columns, generator=generator)
    digits = (chance > zeros).to(torch.uint8) + (chance > (1 + zeros) / 2).to(torch.uint8)
    extremes = torch.rand(rows, 2, generator=generator) * torch.tensor([-1.0, 1.0])
    return qmoe.encode(digits, extremes.flatten().bfloat16())


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHRUN_KERNELS", "off")


def test_the_dictionary_is_the_one_in_c() -> None:
    spelt = [
        tuple((word >> shift & 15) - 1 for shift in range(52, -1, -4) if word >> shift & 15)
        for word in native.dictionary().pairs.tolist()
    ]
    assert qmoe.codewords() == spelt


def test_its_table_is_the_one_in_c(without_kernels: None) -> None:
    qmoe._dictionary_table.cache_clear()
    table = qmoe._dictionary_table(torch.device("cpu"))
    qmoe._dictionary_table.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SWITCHRUN_KERNELS")
        assert torch.equal(table, native.dictionary().table.long())


@few
@given(st.integers(1, 30), st.integers(1, 120), st.sampled_from([0.0, 0.885, 1.0]), st.integers(0, 2**31), st.data())
def test_torch_decodes_what_c_does(rows: int, half: int, zeros: float, seed: int, data: st.DataObject) -> None:
    matrix = random_matrix(seed, rows, 2 * half, zeros)
    begin = data.draw(st.integers(0, rows - 1))
    part = slice(begin, data.draw(st.integers(begin + 1, rows)))
    assert torch.equal(qmoe._decode_by_torch(matrix, part), qmoe.decode(matrix, part))
    assert torch.equal(qmoe.decode(matrix)[part], qmoe.decode(matrix, part))


@few
@given(st.data(), st.integers(0, 2**31))
def test_torch_refuses_what_c_refuses(data: st.DataObject, seed: int) -> None:
    matrix = random_matrix(seed, 12, 90)
    codes, offsets = matrix.codes.clone(), matrix.offsets.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            codes[data.draw(st.integers(0, len(codes) - 1))] = data.draw(st.integers(-(2**15), 2**15 - 1))
        else:
            offsets[data.draw(st.integers(0, 12))] = data.draw(st.integers(-(2**31), 2**31 - 1))
    damaged = replace(matrix, codes=codes, offsets=offsets)
    try:
        dense = qmoe.decode(damaged)
    except native.DamagedMatrixError:
        with pytest.raises(native.DamagedMatrixError):
            qmoe._decode_by_torch(damaged, slice(0, 12))
    else:
        assert torch.equal(qmoe._decode_by_torch(damaged, slice(0, 12)), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 24, 200])
def test_product(dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_matrix(tokens, 300, 138)
    x = torch.randn(2, tokens, 138, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = x.double() @ qmoe.decode(matrix).double().T
    for kernels in (native.path(), "off"):
        monkeypatch.setenv("SWITCHRUN_KERNELS", str(kernels))
        result = matrix.product(x)
        assert (result.dtype, result.shape) == (dtype, (2, tokens, 300))
        torch.testing.assert_close(result.double(), wanted, rtol=8e-3 if dtype is torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_takes_no_more_memory(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = random_matrix(1, 300, 1024), torch.ones(3, 1024)
    x[1, 7] = value
    wanted = x @ qmoe.decode(matrix).float().T
    unpack, unpacked = native.unpack_qmoe, []

    def counting(codes: Any, offsets: Any, extremes: Any, result: torch.Tensor, *rows: int) -> None:
        unpacked.append(result.untyped_storage().nbytes())
        unpack(codes, offsets, extremes, result, *rows)

    monkeypatch.setattr(native, "unpack_qmoe", counting)
    torch.testing.assert_close(matrix.product(x), wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert max(unpacked) < 1 << 20


@pytest.mark.parametrize("kernels", ["", "off"])
def test_damage_is_an_error_that_names_the_place(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = replace(random_matrix(0, 4, 64), place="exp00.pt: tensor wi")
    offsets = matrix.offsets.clone()
    offsets[2] = offsets[3] + 1
    monkeypatch.setenv("SWITCHRUN_KERNELS", kernels)
    for tokens in (1, 300):
        with pytest.raises(
            CorruptCheckpointError, match=r"exp00\.pt: tensor wi: row \d has (codes|offsets) that do not"
        ):
            replace(matrix, offsets=offsets).product(torch.ones(tokens, 64))
        with pytest.raises(CorruptCheckpointError, match="row offsets do not go from 0 to"):
            replace(matrix, codes=matrix.codes[:-1]).product(torch.ones(tokens, 64))
