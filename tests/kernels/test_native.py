"""The C kernels, path by path, against float64; QMoE's dictionary against one that is made in another way."""

from __future__ import annotations

import heapq
import itertools
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from switchrun.errors import UsageError
from switchrun.kernels import native, qmoe
from switchrun.kernels.int8 import quantise_int8
from switchrun.kernels.nf4 import NF4_VALUES, _quantise_by_torch
from switchrun.kernels.qmoe import QmoeMatrix
from switchrun.store.layout import nf4_sizes

pytestmark = pytest.mark.skipif(not native.paths(), reason="built without kernels")
#: The environment of a path is the same for all examples of a test.
small = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])

sizes = st.integers(1, 40)
widths = st.one_of(st.integers(1, 200), st.sampled_from([1, 63, 64, 65, 96, 256, 1087, 1088, 1089, 1250, 2080]))
counts = st.integers(1, 11)
scales = st.sampled_from([0.0, 1e-42, 1e-30, 1e-3, 1.0, 3e4, 1e15])
seeds = st.integers(0, 2**31)


@pytest.fixture(params=native.PATHS, autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in native.paths():
        pytest.skip("not a path of this processor")
    monkeypatch.setenv("SWITCHRUN_KERNELS", request.param)
    return str(request.param)


def random(seed: int, shape: tuple[int, ...], scale: float) -> torch.Tensor:
    """Normal values, some of them zero or of another magnitude."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * scale
    kind = torch.randint(0, 8, shape, generator=generator)
    return torch.where(kind == 0, 0.0, torch.where(kind == 1, values * 1e-3, values))


def assert_close(result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Compare with the product in float64, within what float32 sums and float32's smallest numbers may be off."""
    wanted = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    assert result.dtype == torch.float32
    assert ((result.double() - wanted).abs() <= magnitude * 3e-6 + x.shape[1] * 2e-45).all()


def nf4_by_hand(packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    count = shape[0] * shape[1]
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:count].long()
    values = torch.tensor(NF4_VALUES, dtype=torch.float64)[codes]
    return (values * absmax.double().repeat_interleave(64)[:count]).view(shape)


@small
@given(sizes, widths, counts, scales, scales, seeds, st.integers(1, 3))
def test_bf16(rows: int, width: int, tokens: int, large: float, scale: float, seed: int, threads: int) -> None:
    x, weight = random(seed, (tokens, width), large), random(seed + 1, (rows, width), scale).bfloat16()
    assert_close(native.linear_bf16(x, weight, threads), x, weight)


@small
@given(sizes, widths, counts, scales, seeds)
def test_int8(rows: int, width: int, tokens: int, large: float, seed: int) -> None:
    x, weight = random(seed, (tokens, width), large), random(seed + 1, (rows, width), 0.1)
    codes, scb = torch.empty(rows, width, dtype=torch.int8), torch.empty(rows)
    quantise_int8(weight, codes, scb)
    assert_close(native.linear_int8(x, codes, scb), x, codes.double() * (scb / 127).double().unsqueeze(1))


@small
@given(sizes, widths, counts, scales, seeds)
def test_nf4(rows: int, width: int, tokens: int, large: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes, blocks = nf4_sizes(rows, width)
    packed = torch.randint(0, 256, (codes,), generator=generator, dtype=torch.uint8)
    absmax = random(seed, (blocks,), 1.0).abs().bfloat16()
    x = random(seed + 1, (tokens, width), large)
    assert_close(native.linear_nf4(x, packed, absmax, (rows, width)), x, nf4_by_hand(packed, absmax, (rows, width)))


@small
@given(sizes, widths, st.sampled_from([torch.float32, torch.bfloat16]), st.data(), seeds)
def test_unpacking_nf4(rows: int, width: int, dtype: torch.dtype, data: st.DataObject, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes, blocks = nf4_sizes(rows, width)
    packed = torch.randint(0, 256, (codes,), generator=generator, dtype=torch.uint8)
    absmax = random(seed, (blocks,), 1.0).bfloat16()
    begin = data.draw(st.integers(0, rows))
    end = data.draw(st.integers(begin, rows))
    found = torch.empty(end - begin, width, dtype=dtype)
    native.unpack_nf4(packed, absmax, (rows, width), slice(begin, end), found)
    # A value and a scale are float32: their product in float64 is exact, and rounded once to float32.
    assert torch.equal(found, nf4_by_hand(packed, absmax, (rows, width))[begin:end].float().to(dtype))


@small
@given(st.integers(1, 300), st.sampled_from([0.0, 1e-42, 1e-3, 1.0, 1e15]), seeds)
def test_quantising_nf4_by_c_and_by_torch(count: int, scale: float, seed: int) -> None:
    values = random(seed, (count,), scale)
    codes, blocks = nf4_sizes(1, count)
    found, wanted = ((torch.empty(codes, dtype=torch.uint8), torch.empty(blocks)) for _ in range(2))
    native.quantise_nf4(values, *found)
    _quantise_by_torch(values, *wanted)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1].view(torch.int32), wanted[1].view(torch.int32))


def test_every_int8_and_bf16_value_is_widened_exactly() -> None:
    codes = torch.arange(-128, 128).to(torch.int8).view(-1, 1)
    one = torch.ones(1, 1)
    assert torch.equal(native.linear_int8(one, codes, torch.full((256,), 127.0)).flatten(), codes.float().flatten())
    bits = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(-1, 32)
    finite = torch.where(bits.isfinite(), bits, 0)
    for tokens in (1, 32):
        result = native.linear_bf16(torch.eye(32)[:tokens], finite)
        assert torch.equal(result.T, finite.float()[:, :tokens])


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_so_as_in_torch(tokens: int, value: float) -> None:
    x, weight = torch.ones(tokens, 70), torch.ones(8, 70).bfloat16()
    x[tokens // 2, 3] = value
    weight[2] = 0
    wanted = x @ weight.float().T
    matrix = qmoe.encode(torch.tensor([1] * 70 + [0] * 70).view(2, 70).to(torch.uint8), extremes(2))
    dense = qmoe.decode(matrix)
    for result, expected in (
        (native.linear_bf16(x, weight), wanted),
        (native.linear_int8(x, weight.to(torch.int8), torch.full((8,), 127.0)), wanted),
        (fused(x, matrix), x @ dense.float().T),
    ):
        torch.testing.assert_close(result, expected, equal_nan=True)


def test_damaged_tensors_are_refused() -> None:
    x = torch.ones(1, 64)
    with pytest.raises(ValueError, match="absmax"):
        native.linear_nf4(x, torch.zeros(64, dtype=torch.uint8), torch.ones(1).bfloat16(), (2, 64))
    with pytest.raises(ValueError, match="codes"):
        native.linear_nf4(x, torch.zeros(63, dtype=torch.uint8), torch.ones(2).bfloat16(), (2, 64))
    with pytest.raises(ValueError, match="no rows 1 to 3"):
        native.unpack_nf4(
            torch.zeros(64, dtype=torch.uint8), torch.ones(2).bfloat16(), (2, 64), slice(1, 3), torch.empty(2, 64)
        )
    with pytest.raises(ValueError, match="codes"):
        native.quantise_nf4(torch.ones(64), torch.zeros(31, dtype=torch.uint8), torch.ones(1))
    with pytest.raises(ValueError, match="weight"):
        native.linear_bf16(x, torch.ones(2, 63).bfloat16())
    with pytest.raises(ValueError, match="contiguous"):
        native.linear_bf16(x, torch.ones(64, 2).bfloat16().T)
    with pytest.raises(ValueError, match="SCB"):
        native.linear_int8(x, torch.ones(2, 64, dtype=torch.int8), torch.ones(3))


def test_paths_by_the_environment(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.path() == path
    monkeypatch.setenv("SWITCHRUN_KERNELS", "off")
    assert not native.available()
    with pytest.raises(RuntimeError, match="kernels"):
        native.linear_bf16(torch.ones(1, 4), torch.ones(1, 4).bfloat16())
    monkeypatch.setenv("SWITCHRUN_KERNELS", "mmx")
    with pytest.raises(UsageError, match="SWITCHRUN_KERNELS is 'mmx'"):
        native.path()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or platform.machine() != "x86_64", reason="not Linux on x86")
def test_paths_are_those_that_the_system_names() -> None:
    line = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split(":")[1].split())
    wanted = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}
    assert set(native.paths()) == {"portable", *(path for path, needed in wanted.items() if needed <= flags)}


# QMoE


def extremes(rows: int) -> torch.Tensor:
    return torch.stack([-torch.arange(1, rows + 1), torch.arange(1, rows + 1) * 2], 1).flatten().bfloat16()


def fused(x: torch.Tensor, matrix: QmoeMatrix) -> torch.Tensor:
    return native.linear_qmoe(x, matrix.codes, matrix.offsets, matrix.extremes)


def ternary(seed: int, rows: int, columns: int, zeros: float) -> torch.Tensor:
    chance = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (chance > zeros).to(torch.uint8) + (chance > (1 + zeros) / 2).to(torch.uint8)


def test_dictionary_is_what_another_construction_gives() -> None:
    """By listing every likely sequence first and sorting, with no heap: the probability of a prefix is no less."""
    p = [a * b for a, b in itertools.product((0.885, 0.0575, 0.0575), repeat=2)]
    found: list[tuple[float, tuple[int, ...]]] = []
    least = 2e-7
    level: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    for _ in range(14):
        level = [(q * p[s], (*seq, s)) for q, seq in level for s in range(9) if -q * p[s] > least]
        found += level
    assert len(found) > native.QMOE_WORDS
    words = [seq for _, seq in heapq.nsmallest(native.QMOE_WORDS, found)]
    made = native.dictionary()
    spelt = [tuple((int(n) >> shift & 15) - 1 for shift in range(52, -1, -4) if int(n) >> shift & 15)
             for n in made.pairs.tolist()]  # fmt: skip
    assert spelt == words
    for code, entry in enumerate(made.table.tolist()):
        digits = [digit for pair in words[code] for digit in (pair % 3, pair // 3)]
        assert entry & 31 == len(digits)
        decoded = [0] * len(digits)
        for i in range(3):
            if entry >> (20 + 2 * i) & 3:
                decoded[entry >> (5 + 5 * i) & 31] = entry >> (20 + 2 * i) & 3
            else:
                assert entry >> (5 + 5 * i) & 31 == 0
        assert decoded == digits


@small
@given(sizes, st.integers(0, 150), st.sampled_from([0.0, 0.5, 0.885, 0.99, 1.0]), seeds)
def test_decoding_what_was_encoded(rows: int, half: int, zeros: float, seed: int) -> None:
    digits = ternary(seed, rows, 2 * half, zeros)
    matrix = qmoe.encode(digits, extremes(rows))
    values = torch.cat([torch.zeros(rows, 1), extremes(rows).float().view(rows, 2)], 1)
    assert torch.equal(qmoe.decode(matrix).float(), values.gather(1, digits.long()))


@small
@given(sizes, st.integers(1, 150), st.integers(1, 70), st.sampled_from([0.0, 0.885, 1.0]), scales, seeds)
def test_qmoe(rows: int, half: int, tokens: int, zeros: float, large: float, seed: int) -> None:
    x = random(seed, (tokens, 2 * half), large)
    digits = ternary(seed, rows, 2 * half, zeros)
    digits[0][digits[0] == 1] = 0  # a row without negatives has the minimum 0
    values = extremes(rows)
    values[0] = 0
    matrix = qmoe.encode(digits, values)
    assert_close(fused(x, matrix), x, qmoe.decode(matrix))


@small
@given(st.data(), st.sampled_from([1, 3, 40]), seeds)
def test_damaged_qmoe_is_named_or_computed_and_nothing_else(data: st.DataObject, tokens: int, seed: int) -> None:
    matrix = qmoe.encode(ternary(seed, 12, 90, 0.885), extremes(12))
    codes, offsets = matrix.codes.clone(), matrix.offsets.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            codes[data.draw(st.integers(0, len(codes) - 1))] = data.draw(st.integers(-(2**15), 2**15 - 1))
        else:
            offsets[data.draw(st.integers(1, 11))] = data.draw(st.integers(-(2**31), 2**31 - 1))
    x = torch.ones(tokens, 90)
    damaged = QmoeMatrix(codes, offsets, matrix.extremes, 90)
    try:
        dense = qmoe.decode(damaged)
    except native.DamagedMatrixError as error:
        with pytest.raises(native.DamagedMatrixError, match=str(error)):
            fused(x, damaged)
    else:
        assert_close(fused(x, damaged), x, dense)


def test_damage_by_kind() -> None:
    matrix = qmoe.encode(ternary(0, 4, 64, 0.885), extremes(4))
    offsets = matrix.offsets.clone()
    offsets[2] = offsets[3] + 1
    with pytest.raises(native.DamagedMatrixError, match=r"row 1 has codes that do not fill it"):
        qmoe.decode(QmoeMatrix(matrix.codes, offsets, matrix.extremes, 64))
    offsets[1], offsets[2] = matrix.offsets[1], 0
    with pytest.raises(native.DamagedMatrixError, match=r"row 1 has offsets that do not rise"):
        qmoe.decode(QmoeMatrix(matrix.codes, offsets, matrix.extremes, 64))
    offsets[-1] += 1
    with pytest.raises(native.DamagedMatrixError, match="row offsets"):
        qmoe.linear_qmoe(torch.ones(1, 64), QmoeMatrix(matrix.codes, offsets, matrix.extremes, 64))
    with pytest.raises(ValueError, match="pairs"):
        qmoe.encode(torch.zeros(1, 3, dtype=torch.uint8), extremes(1))
    with pytest.raises(ValueError, match="0, 1 and 2"):
        qmoe.encode(torch.full((1, 4), 3, dtype=torch.uint8), extremes(1))
