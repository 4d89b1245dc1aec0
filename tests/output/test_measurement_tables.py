"""What bench prints: the summary last, a column for each cell, in words, and nothing folded."""

from __future__ import annotations

import io
import re
import sys

import pytest

from switchrun.bench.records import Record
from switchrun.bench.verdict import verdict
from switchrun.output.measurement_tables import BenchFormat, format_records
from tests.support.bench_records import GIB, failed, measured

CELLS = [
    *(measured(batch_size=2**size, cpu_memory_bytes=4 * GIB, model="/models/my " + "long/" * 20) for size in range(11)),
    failed(batch_size=2**11, cpu_memory_bytes=4 * GIB, model="/models/my " + "long/" * 20),
]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 80 columns."""
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "__stdout__", _Terminal())


def summary(text: str) -> list[str]:
    """The lines of the summary and what comes below."""
    return text[text.index("Summary") :].splitlines()


def test_one_cell() -> None:
    text = format_records([measured()], BenchFormat.TABLE)
    lines = summary(text)
    assert lines[1].split() == ["median"]
    rows = dict(re.split(" {2,}", line) for line in lines[3:] if "  " in line)
    assert rows == {
        "time to open": "2.70 s",
        "time to first token": "3.00 s",
        "time per token": "500.0 ms",
        "time of a fill": "10.00 s",
        "inputs filled": "0.1/s",
        "hit rate": "58.3%",
        "experts read": "9.52 GiB",
        "waiting for experts": "7.10 s",
        "peak memory": "4 GiB",
    }
    assert lines[-2:] == ["", verdict([measured()])]
    assert not re.search(r"\b(TTFT|ITL|RSS|p95|\w+_seconds)\b", text)


def test_many_cells_on_a_terminal(narrow: None) -> None:
    text = format_records(CELLS, BenchFormat.TABLE)
    assert [line for line in text.splitlines() if len(line) > 80] == [f"  {CELLS[0]['knobs']['model']}"]
    lines = summary(text)
    assert [line.split() for line in lines if "cell 1 " in line] == [
        "cell 1 cell 2 cell 3 cell 4 cell 5 cell 6".split()
    ]
    assert sum(line.startswith("time to first token") for line in lines) == 2, "in two blocks"
    assert lines.index("Cell 12 failed: it needs 5 GiB (raise --cpu-memory)") > 25
    assert " ".join(lines).endswith("1 cell of 12 failed.")


def test_many_cells_in_a_pipe() -> None:
    text = format_records(CELLS, BenchFormat.TABLE)
    lines = summary(text)
    opened = next(line for line in lines if line.startswith("time to open"))
    assert len(re.split(" {2,}", opened)) == 13
    assert opened.endswith("failed")
    assert lines[-1] == verdict(CELLS)
    shared = text.split("\n\n")[0]
    assert f"model     {CELLS[0]['knobs']['model']}\n" in shared
    assert "batch" not in shared, "what differs stands with each cell"
    assert "Measured in cell 3" in text


def test_markdown_ends_with_the_summary_too() -> None:
    lines = format_records(CELLS[-2:], BenchFormat.MD).splitlines()
    assert lines[-1] == verdict(CELLS[-2:])
    assert lines[-3] == "Cell 2 failed: it needs 5 GiB (raise --cpu-memory)"
    assert "| time to first token | 3.00 s | – |" in lines


def test_notes_name_metrics_in_words() -> None:
    record: Record = measured(notes=("noisy, the samples differ by more than 20 %: ttft_seconds, itl_p95_seconds",))
    text = format_records([record], BenchFormat.TABLE)
    assert "20 %: time to first token, time per token (95th percentile)\n" in text
