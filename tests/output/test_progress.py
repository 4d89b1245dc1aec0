"""The progress line: only on terminals, one line that fits, erased without a trace."""

from __future__ import annotations

import io

import pytest

from switchrun.model.records import Progress
from switchrun.output import progress
from switchrun.output.progress import ByteProgress, InputProgress, SessionProgress

ERASE = "\r\x1b[2K"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give the time that the progress line sees, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    return now


def test_stages(clock: list[float]) -> None:
    stream = _Terminal()
    line = SessionProgress(stream)
    line(Progress("open", 10**9, 2 * 10**9, 0))
    line(Progress("encode", 1, 15, 0))
    clock[0] += 2
    line(Progress("encode", 2, 15, 3 * 10**9))
    line(Progress("decode", 1, 64, 3 * 10**9))
    assert stream.getvalue().split(ERASE)[1:] == [
        "open: 954 MiB of 1.86 GiB",
        "encode: 1 of 15 layers, 0 B read",
        "encode: 2 of 15 layers, 2.79 GiB read, 1.50 GB/s",
        "decode: 1 of 64 tokens, 2.79 GiB read",
    ]


def test_it_is_not_drawn_too_often(clock: list[float]) -> None:
    stream = _Terminal()
    line = SessionProgress(stream)
    for token in range(10):
        line(Progress("decode", token, 64, 0))
        clock[0] += progress.REDRAW_SECONDS / 4
    assert stream.getvalue().count("decode") == 3


def test_it_fits_into_the_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    stream = _Terminal()
    SessionProgress(stream)(Progress("decode", 1, 64, 0))
    assert stream.getvalue() == ERASE + "decode: 1 o"


def test_clear_erases_what_is_shown_and_only_that(clock: list[float]) -> None:
    stream = _Terminal()
    line = SessionProgress(stream)
    line.clear()
    assert stream.getvalue() == ""
    line(Progress("decode", 1, 64, 0))
    line.clear()
    line.clear()
    assert stream.getvalue().endswith("read" + ERASE)
    assert stream.getvalue().count(ERASE) == 2
    line(Progress("decode", 2, 64, 0))
    assert "decode: 2" in stream.getvalue(), "after an erasure the line comes back at once"


def test_nothing_where_nobody_looks(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    pipe, unwanted, dumb = io.StringIO(), _Terminal(), _Terminal()
    SessionProgress(pipe)(Progress("decode", 1, 64, 0))
    SessionProgress(unwanted, wanted=False)(Progress("decode", 1, 64, 0))
    monkeypatch.setenv("TERM", "dumb")
    SessionProgress(dumb)(Progress("decode", 1, 64, 0))
    assert pipe.getvalue() + unwanted.getvalue() + dumb.getvalue() == ""


def test_bytes_have_a_rate_and_an_end(clock: list[float]) -> None:
    stream = _Terminal()
    line = ByteProgress(stream, "prepare")
    line(0, 4 * 2**30)
    clock[0] += 4
    line(2**30, 4 * 2**30)
    line(2**30 + 1, 4 * 2**30)
    line.clear()
    assert stream.getvalue().split(ERASE)[1:] == [
        "prepare: 0 B of 4 GiB (0 %)",
        "prepare: 1 GiB of 4 GiB (25 %), 0.27 GB/s, 12.00 s left",
        "",
    ]


def test_bytes_are_not_drawn_where_nobody_looks(clock: list[float]) -> None:
    pipe = io.StringIO()
    ByteProgress(pipe, "verify")(0, 0)
    assert pipe.getvalue() == ""


def test_inputs_have_a_rate_and_an_end(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered before, and the time to open, say nothing about the rate."""
    monkeypatch.setenv("COLUMNS", "200")
    stream = _Terminal()
    line = InputProgress(stream, total=5000, done=1000)
    line(Progress("open", 10**9, 2 * 10**9, 0))
    clock[0] += 100
    line(Progress("encode", 1, 15, 0))
    clock[0] += 10
    line.done = 1040
    line(Progress("decode", 1, 64, 0))
    clock[0] += 90
    line.done = 1050
    line(Progress("decode", 2, 64, 0))
    line.done = 5000
    assert stream.getvalue().split(ERASE)[1:] == [
        "open: 954 MiB of 1.86 GiB",
        "1,000 of 5,000 inputs (20 %); encode: 1 of 15 layers, 0 B read",
        "1,040 of 5,000 inputs (20 %), 4.0 inputs/s, 16 min 30 s left; decode: 1 of 64 tokens, 0 B read",
        "1,050 of 5,000 inputs (21 %), 2.00 s an input, 2 h 11 min left; decode: 2 of 64 tokens, 0 B read",
    ]
    assert line.describe() == "5,000 of 5,000 inputs (100 %), 40.0 inputs/s"


def test_what_comes_from_the_hub(clock: list[float]) -> None:
    stream = _Terminal()
    line = SessionProgress(stream)
    line.expected_hub_bytes = 11 * 2**30
    line(Progress("fetch", 2**20, 2 * 2**30, 0, 5 * 2**20))
    clock[0] += 8
    line(Progress("fetch", 2**30, 2 * 2**30, 0, 2**30))
    line(Progress("open", 2**30, 2 * 2**30, 0, 2 * 2**30))
    line(Progress("encode", 1, 15, 0, 2 * 2**30))
    clock[0] += 100
    line(Progress("encode", 2, 15, 3 * 2**30, 3 * 2**30))
    line(Progress("decode", 1, 64, 3 * 2**30, 3 * 2**30))
    clock[0] += 10
    line(Progress("decode", 2, 64, 4 * 2**30, 3 * 2**30))  # all of it was kept
    clock[0] += 10
    line(Progress("decode", 3, 64, 5 * 2**30, 12 * 2**30))  # more than was expected
    assert stream.getvalue().split(ERASE)[1:] == [
        "fetch: 1 MiB of 2 GiB",
        "fetch: 1 GiB of 2 GiB, 0.13 GB/s, 8.04 s left",
        "open: 1 GiB of 2 GiB",
        "encode: 1 of 15 layers, 0 B read",
        "encode: 2 of 15 layers, 3 GiB of ~11 GiB fetched, 10.74 MB/s, 13 min 20 s left",
        "decode: 1 of 64 tokens, 3 GiB read",
        "decode: 2 of 64 tokens, 4 GiB read, 0.11 GB/s",
        "decode: 3 of 64 tokens, 12 GiB fetched, 0.48 GB/s",
    ]
