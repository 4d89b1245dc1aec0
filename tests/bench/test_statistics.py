"""Medians, percentiles, noise, and the product of lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchrun.bench.records import divide, noisy, percentile, summarise
from switchrun.bench.runner import Cell, product

SAMPLES = st.lists(st.floats(0, 1e9), min_size=1, max_size=9)


def test_a_summary() -> None:
    assert summarise([3, None, 1, 2, 10]) == {"median": 2.5, "min": 1, "max": 10, "samples": [3, 1, 2, 10]}
    assert summarise([None]) is None
    assert summarise([]) is None


@given(SAMPLES)
def test_a_summary_is_in_order(samples: list[float]) -> None:
    summary = summarise(samples)
    assert summary
    assert summary["min"] <= summary["median"] <= summary["max"]


def test_percentiles() -> None:
    assert percentile([], 0.5) is None
    assert percentile([7], 0.95) == 7
    assert percentile([3, 1, 2], 0) == 1
    assert percentile([3, 1, 2], 1) == 3
    assert percentile(list(range(101)), 0.95) == pytest.approx(95)
    assert percentile([0, 10], 0.25) == 2.5


@given(SAMPLES, st.floats(0, 1))
def test_a_percentile_lies_among_the_samples(samples: list[float], share: float) -> None:
    value = percentile(samples, share)
    assert value is not None
    assert min(samples) <= value <= max(samples) * (1 + 1e-9)


def test_ratios() -> None:
    assert divide(1, 4) == 0.25
    assert divide(None, 1) is divide(1, None) is divide(1, 0) is None


def test_noise_is_a_wide_range_of_a_time_or_a_rate() -> None:
    metrics = {
        "open_seconds": summarise([1, 1.3]),
        "fill_seconds": summarise([1, 1.1]),
        "a_bytes_per_second": summarise([1, 2]),
        "load_bytes": summarise([1, 2]),
        "zero_seconds": summarise([0, 0]),
        "itl_seconds": None,
    }
    assert noisy(metrics) == ["open_seconds", "a_bytes_per_second"]


def test_the_product_has_every_combination_once() -> None:
    cells = product(Cell("m", seed=5), ["bf16", "fp32"], [None, 2**30], [1, 8, 32])
    assert len(set(cells)) == 12
    assert [cell.batch_size for cell in cells[:3]] == [1, 8, 32]
    assert {cell.seed for cell in cells} == {5}
    assert cells[-1].cpu_memory_bytes == 2**30
