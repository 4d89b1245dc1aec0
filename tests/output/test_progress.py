"""The progress line: only on terminals, one line that fits, erased without a trace; in a log a line now and then."""

from __future__ import annotations

import io
import threading

import pytest

from switchrun.model.records import Progress
from switchrun.output import progress
from switchrun.output.progress import ByteProgress, InputProgress, Line, MeasurementProgress, SessionProgress
from switchrun.output.terminal import width

ERASE = "\r\x1b[2K"
GIB = 2**30


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """What was drawn, one after another; an erasure is an empty one."""
        return self.getvalue().split(ERASE)[1:]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give the time that the progress line sees, as a list of one number."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    return now


# What is done, in words


def test_stages(clock: list[float]) -> None:
    stream = _Terminal()
    line = SessionProgress(stream, "/models/tiny", "line")
    line.opening()
    line(Progress("index", 0, 0, 0))
    line(Progress("plan", 0, 0, 0))
    line(Progress("import", 0, 0, 0))
    clock[0] += 4
    line(Progress("import", 0, 0, 0))
    line(Progress("open", 10**9, 2 * 10**9, 0))
    line(Progress("encode", 0, 15, 0, ids=(11,)))
    clock[0] += 2
    line(Progress("encode", 1, 15, 3 * 10**9, ids=(11,)))
    clock[0] += 1
    line(Progress("encode", 15, 15, 3 * 10**9, ids=(11,)))
    line(Progress("decode", 1, 64, 3 * 10**9, ids=(11,)))
    clock[0] += 10
    line(Progress("decode", 5, 64, 3 * 10**9, ids=(11,)))
    clock[0] += 1
    line(Progress("decode", 36, 64, 3 * 10**9, ids=(11,)))
    assert stream.lines() == [
        "opening tiny…",
        "opening tiny: reading headers",
        "opening tiny: planning",
        "opening tiny: importing torch and transformers",
        "opening tiny: importing torch and transformers, 4 s",
        "opening tiny: reading dense weights, 954 MiB of 1.86 GiB",
        "line 12: encoder layer 1 of 15",
        "line 12: encoder layer 2 of 15, 2.79 GiB read at 1.50 GB/s",
        "line 12: waiting for the first token, 2.79 GiB read at 1.50 GB/s",
        "line 12: token 1 of at most 64, 2.79 GiB read at 1.50 GB/s",
        "line 12: token 5 of at most 64, 2 s a token, 2.79 GiB read",
        "line 12: token 36 of at most 64, 3.2 tokens/s, 2.79 GiB read",
    ]


@pytest.mark.parametrize(
    ("ids", "columns", "where"),
    [
        ((7,), 80, "line 8: "),
        ((8, 9, 10), 120, "batch 1, lines 9–11: "),
        ((8, 9, 10), 80, "lines 9–11: "),
        ((9, 3, 20), 120, "batch 1, 3 lines: "),
        ((), 120, ""),
    ],
)
def test_which_inputs(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, ids: tuple[int, ...], columns: int, where: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for label, shown in (("line", where), (None, "")):
        stream = _Terminal()
        SessionProgress(stream, "tiny", label)(Progress("score", 2, 30, 0, ids=ids))
        assert stream.lines() == [f"{shown}layer 3 of 30"]


def test_batches_are_counted(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = _Terminal()
    line = SessionProgress(stream, None, "line")
    for ids in ((0, 1), (2, 3), (4, 5)):
        line(Progress("encode", 0, 15, 0, ids=ids))
        clock[0] += 1
        line(Progress("decode", 1, 64, 0, ids=ids))
        clock[0] += 2
        line(Progress("decode", 5, 64, 0, ids=ids))
    assert stream.lines()[-1] == "batch 3, lines 5–6: token 5 of at most 64, 2.0 tokens/s each"


def test_a_rate_is_there_only_while_something_is_read(clock: list[float]) -> None:
    """It is that of the last seconds, neither sinks while nothing comes, nor counts the time before."""
    stream = _Terminal()
    line = SessionProgress(stream)
    read = 0
    for second in range(40):
        clock[0] += 1
        read += 10**9 * (second < 3 or second >= 30)
        line(Progress("decode", 1, 64, read))
    shown = [text.partition("read")[2] for text in stream.lines()]
    assert set(shown[2:8]) == {" at 1.00 GB/s"}, "until five seconds later it is as it last was"
    assert set(shown[8:30]) == {""}
    assert set(shown[31:]) == {" at 1.00 GB/s"}


def test_what_comes_from_the_hub(clock: list[float]) -> None:
    stream = _Terminal()
    line = SessionProgress(stream, "google/switch-c-2048")
    line.expected_hub_bytes = 11 * GIB
    line(Progress("ask", 0, 0, 0))
    clock[0] += 3
    line(Progress("index", 0, 0, 0))
    line(Progress("index", 1, 364, 0, 2**20))
    clock[0] += 10
    line(Progress("index", 91, 364, 0, 11 * 2**20))
    line(Progress("fetch", 0, 2 * GIB, 0, 11 * 2**20))
    clock[0] += 2
    line(Progress("fetch", 0, 2 * GIB, 0, 35 * 2**20))  # no piece is whole yet
    clock[0] += 1
    line(Progress("fetch", 0, 0, 0, 35 * 2**20))
    clock[0] += 60
    line(Progress("encode", 0, 15, 0, 2 * GIB))
    clock[0] += 100
    line(Progress("encode", 2, 15, 3 * GIB, 3 * GIB))
    clock[0] += 1
    line(Progress("decode", 1, 64, 3 * GIB, 3 * GIB))
    clock[0] += 10
    line(Progress("decode", 2, 64, 4 * GIB, 3 * GIB))  # all of it was kept
    clock[0] += 10
    line(Progress("decode", 3, 64, 5 * GIB, 12 * GIB))  # more than was expected
    assert stream.lines() == [
        "opening switch-c-2048: asking the Hub",
        "opening switch-c-2048: reading headers",
        "opening switch-c-2048: reading headers, 91 of 364 files, 11 MiB, 1.05 MB/s",
        "opening switch-c-2048: fetching 0 B of 2 GiB, 1.05 MB/s, 34 min left",
        "opening switch-c-2048: fetching 24 MiB of 2 GiB, 2.97 MB/s, 12 min left",
        "opening switch-c-2048: another process fetches the dense weights, 3 s",
        "encoder layer 1 of 15, Hub: 2 GiB of ~11 GiB, 35.18 MB/s, 5 min left",
        "encoder layer 3 of 15, Hub: 3 GiB of ~11 GiB, 10.74 MB/s, 13 min left",
        "token 1 of at most 64, Hub: 3 GiB of ~11 GiB, 10.74 MB/s, 13 min left",
        "token 2 of at most 64, 4 GiB read at 0.11 GB/s, 10 s a token",
        "token 3 of at most 64, Hub: 12 GiB, 0.97 GB/s, 10 s a token",
    ]


def test_a_download(clock: list[float]) -> None:
    stream = _Terminal()
    line = SessionProgress(stream, "org/tiny@v1")
    line(Progress("download", 0, 4 * GIB, 0, 0))
    clock[0] += 4
    line(Progress("download", GIB, 4 * GIB, 0, GIB))
    assert stream.lines() == [
        "opening tiny@v1: downloading 0 B of 4 GiB",
        "opening tiny@v1: downloading 1 GiB of 4 GiB, 0.27 GB/s, 12 s left",
    ]


def test_bytes_have_a_rate_and_an_end(clock: list[float]) -> None:
    stream = _Terminal()
    line = ByteProgress(stream, "prepare")
    line(0, 4 * GIB)
    clock[0] += 4
    line(GIB, 4 * GIB)
    line(GIB + 1, 4 * GIB)
    line.clear()
    assert stream.lines() == ["prepare: 0 B of 4 GiB (0 %)", "prepare: 1 GiB of 4 GiB (25 %), 0.27 GB/s, 12 s left", ""]


def test_inputs_have_a_rate_and_an_end(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered before, and the time to open, say nothing about the rate, nor does the batch under way."""
    monkeypatch.setenv("COLUMNS", "200")
    stream = _Terminal()
    line = InputProgress(stream, "tiny", total=5000, done=1000)
    line(Progress("open", 10**9, 2 * 10**9, 0))
    clock[0] += 100
    line(Progress("encode", 0, 15, 0))
    clock[0] += 10
    line.answered(1040)
    line(Progress("decode", 1, 64, 0))
    clock[0] += 30
    line(Progress("decode", 2, 64, 0))
    clock[0] += 60
    line.answered(1050)
    line(Progress("decode", 4, 64, 0))
    line.answered(5000)
    assert stream.lines() == [
        "opening tiny: reading dense weights, 954 MiB of 1.86 GiB",
        "1,000 of 5,000 inputs (20 %), encoder layer 1 of 15",
        "1,040 of 5,000 inputs (20 %), 4.0 inputs/s, 16 min left, token 1 of at most 64",
        "1,040 of 5,000 inputs (20 %), 4.0 inputs/s, 16 min left, token 2 of at most 64, 30 s a token",
        "1,050 of 5,000 inputs (21 %), 2.00 s an input, 2 h 11 min left, token 4 of at most 64, 30 s a token",
    ]
    assert line.describe() == ["5,000 of 5,000 inputs (100 %)", "40.0 inputs/s"]


def test_what_is_measured(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    stream = _Terminal()
    line = MeasurementProgress(stream)
    take = line.watch("cell 2 of 6: bf16, batch 1, warm, 3 fills")
    step = {"stage": "open", "done": 0, "total": GIB, "load_bytes": 0, "hub_bytes": 0, "ids": []}
    clock[0] += 12
    take(None)
    clock[0] += 1
    take(step)
    clock[0] += 1
    take(step | {"stage": "decode", "done": 5, "total": 12, "ids": [1]})
    clock[0] += 1
    take(step | {"stage": "replay"})
    take = line.watch("dtype 2 of 4: int8")
    take(step | {"stage": "score", "done": 0, "total": 24})
    clock[0] += 10
    take(step | {"stage": "score", "done": 4, "total": 24})
    take(step | {"stage": "generate", "done": 0, "total": 200})
    clock[0] += 10
    take(step | {"stage": "generate", "done": 16, "total": 200})
    cell = "cell 2 of 6: bf16, batch 1, warm, 3 fills"
    assert stream.lines() == [
        cell,
        f"{cell}, 12 s",
        f"{cell}, 13 s, reading dense weights, 0 B of 1 GiB",
        f"{cell}, 14 s, fill 2: token 5 of 12",
        f"{cell}, 15 s, reading the same without a model",
        "dtype 2 of 4: int8",
        "dtype 2 of 4: int8, 1 s, layer 1 of 24",
        "dtype 2 of 4: int8, 10 s, layer 5 of 24, 50 s left",
        "dtype 2 of 4: int8, 10 s, passage 1 of 200",
        "dtype 2 of 4: int8, 20 s, passage 17 of 200, 2 min left",
    ]


# On a terminal


def test_it_is_not_drawn_too_often(clock: list[float]) -> None:
    stream = _Terminal()
    line = SessionProgress(stream)
    for token in range(10):
        line(Progress("decode", token, 64, 0))
        clock[0] += progress.REDRAW_SECONDS / 4
    assert stream.getvalue().count("token") == 3


@pytest.mark.parametrize("columns", [12, 40, 80, 120])
@pytest.mark.parametrize("name", ["漢字の模型" * 9, "org/" + "long-name-" * 9, "bad\x1b[2Jname\n"])
def test_it_fits_into_the_terminal(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, columns: int, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = _Terminal()
    line = SessionProgress(stream, name, "line")
    line.opening()
    for step in (
        Progress("fetch", 10**9, 2 * 10**9, 0, 10**9),
        Progress("encode", 1, 15, 10**9, 2 * 10**9, (8, 9)),
        Progress("decode", 5, 64, 10**9, 3 * 10**9, (8, 9)),
    ):
        clock[0] += 3
        line(step)
    shown = stream.lines()
    assert len(shown) == 4
    assert all(width(text) < columns and "\x1b" not in text and "\n" not in text for text in shown), shown
    assert not any(text.endswith((",", ", ")) for text in shown)


def test_clear_erases_what_is_shown_and_only_that(clock: list[float]) -> None:
    stream = _Terminal()
    line = SessionProgress(stream)
    line.clear()
    assert stream.getvalue() == ""
    line(Progress("decode", 1, 64, 0))
    line.clear()
    line.clear()
    assert stream.getvalue() == f"{ERASE}token 1 of at most 64{ERASE}"
    line(Progress("decode", 2, 64, 0))
    assert "token 2" in stream.getvalue(), "after an erasure the line comes back at once"


def test_nothing_is_drawn_where_something_else_is_written(clock: list[float]) -> None:
    stream = _Terminal()
    line = SessionProgress(stream)
    line(Progress("decode", 1, 64, 0))
    with line.hidden():
        other = threading.Thread(target=line, args=(Progress("open", 1, 2, 0),))
        other.start()
        other.join(0.05)
        stream.write("a note\n")
    other.join()
    assert stream.getvalue().index("a note") < stream.getvalue().index("reading dense weights")


def test_nothing_where_nobody_looks(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    pipe, unwanted = io.StringIO(), _Terminal()
    for line in (SessionProgress(pipe), SessionProgress(unwanted, wanted=False)):
        line.opening()
        line(Progress("decode", 1, 64, 0))
        line.clear()
    ByteProgress(pipe, "verify")(0, 0)
    assert pipe.getvalue() + unwanted.getvalue() == ""


def test_a_dumb_terminal_hears_of_the_beginning(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = _Terminal()
    line = SessionProgress(stream, "tiny")
    line.opening()
    line(Progress("decode", 1, 64, 0))
    line.clear()
    assert stream.getvalue() == "opening tiny…\n"


def test_a_stderr_that_takes_nothing_does_not_stop_the_work(clock: list[float]) -> None:
    class Full(_Terminal):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    Line(Full()).begin("opening tiny…")


# In a log


def test_a_line_now_and_then_in_a_log(clock: list[float]) -> None:
    stream = io.StringIO()
    line = SessionProgress(stream, "google/switch-c-2048")
    line.opening()
    for second in range(95):
        clock[0] += 1
        line(Progress("download", second * 10**7, 3 * 10**9, 0, second * 10**7))
    assert stream.getvalue().splitlines() == [
        "switchrun: opening switch-c-2048: downloading 277 MiB of 2.79 GiB, 10.00 MB/s, 5 min left",
        "switchrun: opening switch-c-2048: downloading 563 MiB of 2.79 GiB, 10.00 MB/s, 4 min left",
        "switchrun: opening switch-c-2048: downloading 849 MiB of 2.79 GiB, 10.00 MB/s, 4 min left",
    ]


def test_short_work_after_long_waits_is_not_in_a_log(clock: list[float]) -> None:
    stream = io.StringIO()
    line = SessionProgress(stream, None, "line")
    for number in range(5):
        clock[0] += 600  # nobody writes into the pipe
        for token in range(20):
            clock[0] += 1
            line(Progress("decode", token, 64, 0, ids=(number,)))
    assert stream.getvalue() == ""


def test_every_measurement_is_in_a_log(clock: list[float]) -> None:
    stream = io.StringIO()
    take = MeasurementProgress(stream).watch("cell 1 of 2")
    for _ in range(35):
        clock[0] += 1
        take(None)
    assert stream.getvalue() == "switchrun: cell 1 of 2\nswitchrun: cell 1 of 2, 30 s\n"
