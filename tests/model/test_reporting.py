"""A session's callback hears of each step, and of what comes in the middle of a long one."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest

from switchrun.model import reporting
from switchrun.model.records import Progress
from switchrun.model.reporting import Reporter


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "BEAT_SECONDS", 0.01)


def wait_until(done: Any) -> None:
    end = time.monotonic() + 30
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_long_step_is_told_again_with_what_has_come_since() -> None:
    told: list[Progress] = []
    report = Reporter(told.append)
    read, hub = [0], SimpleNamespace(traffic=SimpleNamespace(bytes=5))
    report.read_bytes = lambda: read[0]
    report.reads(hub)  # type: ignore[arg-type] # only its counts
    with report.working((3, 4)):
        report("encode", 0, 15)
        read[0], hub.traffic.bytes = 100, 7
        wait_until(lambda: told[-1].load_bytes)
    assert told[0] == Progress("encode", 0, 15, 0, 5, (3, 4))
    assert told[-1] == Progress("encode", 0, 15, 100, 7, (3, 4))
    ended = len(told)
    time.sleep(0.05)
    assert len(told) == ended, "nothing is told between two batches"
    with report.working():
        time.sleep(0.05)
        assert len(told) == ended, "nor before the first step"


def test_a_download_counts_its_own_bytes() -> None:
    told: list[Progress] = []
    Reporter(told.append)("download", 10, 20)
    assert told == [Progress("download", 10, 20, 0, 10)]


def test_without_a_callback_there_is_no_thread() -> None:
    before = threading.active_count()
    with Reporter().working():
        assert threading.active_count() == before


def test_a_callback_that_fails() -> None:
    calls = 0

    def refuse(_progress: Progress) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise ZeroDivisionError

    report = Reporter(refuse)
    with report.working():
        report("plan")
        wait_until(lambda: calls == 2)  # the thread ends, and says nothing
        with pytest.raises(ZeroDivisionError):
            report("import")
