"""Sizes and rates, read and written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchrun.errors import UsageError
from switchrun.units import GIB, KIB, MIB, TIB, format_bytes, format_count, format_rate, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", MIB),
        ("10B", 10),
        ("6GiB", 6 * GIB),
        ("6G", 6 * GIB),
        ("6gib", 6 * GIB),
        (" 512 MiB ", 512 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        (".5k", 512),
        ("2.K", 2 * KIB),
        ("1.5GB", 1_500_000_000),
        ("800mb", 800_000_000),
        ("3kB", 3000),
        ("2T", 2 * TIB),
        ("2TB", 2 * 10**12),
        ("1.9", 1),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "lots", "6X", "-1GiB", "+1GiB", "1,5GiB", "6 GiB 2", "GiB", ".", "1e9", "inf", "nan", "6PiB", "٣GiB", "²"],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["9" * 400, "9" * 400 + "TiB", "9000000TiB"])
def test_sizes_beyond_any_machine(text: str) -> None:
    with pytest.raises(UsageError, match="more than any machine has") as caught:
        parse_bytes(text)
    assert len(caught.value.message) < 100


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1023.8, "1 KiB"),
        (KIB, "1 KiB"),
        (1536, "1.5 KiB"),
        (MIB - 1, "1 MiB"),
        (51_118_080, "48.8 MiB"),
        (6 * GIB, "6 GiB"),
        (100 * GIB, "100 GiB"),
        (GIB + GIB // 100, "1.01 GiB"),
        (2 * TIB, "2 TiB"),
        (5000 * TIB, "5000 TiB"),
    ],
)
def test_sizes_are_written(size: float, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(0, 1 << 60))
def test_a_written_size_is_read_as_nearly_the_same(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.006, abs=0.5)


@pytest.mark.parametrize(
    ("rate", "text"),
    [(1.82e9, "1.82 GB/s"), (1e8, "0.10 GB/s"), (99e6, "99.00 MB/s"), (250e3, "0.25 MB/s"), (0, "0.00 MB/s")],
)
def test_rates_are_written(rate: float, text: str) -> None:
    assert format_rate(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 ms"),
        (0.0048, "4.8 ms"),
        (0.9999, "999.9 ms"),
        (0.99999, "1.00 s"),
        (2.314, "2.31 s"),
        (119.99, "119.99 s"),
        (119.999, "2 min 00 s"),
        (200, "3 min 20 s"),
        (7199.6, "2 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_are_written(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_one_of_something_is_no_plural() -> None:
    assert [format_count(number, "GPU") for number in (0, 1, 2)] == ["0 GPUs", "1 GPU", "2 GPUs"]
    assert [format_count(number, "pass", "passes") for number in (1, 2)] == ["1 pass", "2 passes"]
