"""What a process can tell about itself: how old it is, what it read from disks, how its memory grew."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from switchrun.machine import processor, ram

_INTERVAL_SECONDS = 0.1


def io_read_bytes() -> int | None:
    """Give the bytes that this process made the system read from disks so far; None where that is not told."""
    try:
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    except OSError:
        pass
    return None


def group_peak_bytes(task: dict[str, Any]) -> int | None:
    """Give the most that this process's control group took so far, page cache included; None if it has none."""
    try:
        return int(Path(task["group_peak_file"]).read_text())
    except (KeyError, OSError, ValueError):
        return None


def reset_peak_rss() -> None:
    """Let the system count this process's peak anew, from what it takes now on; where it cannot, let it be."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class MemoryTimeline:
    """Notes the resident set ten times a second, on a thread of its own, for as long as the block runs.

    Attributes:
        points: (age of the process in seconds, resident bytes).
    """

    def __init__(self) -> None:
        self.points: list[tuple[float, int]] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while True:
            self.points.append((round(processor.process_age_seconds(), 2), ram.rss_bytes()))
            if self._end.wait(_INTERVAL_SECONDS):
                return

    def stop(self) -> None:
        """End the thread; stopping twice does nothing."""
        self._end.set()
        self._thread.join()

    def __enter__(self) -> MemoryTimeline:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
