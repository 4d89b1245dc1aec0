"""The progress line of work that is counted in bytes: how much is done, how fast, and how long it will take."""

from __future__ import annotations

import time
from typing import TextIO

from switchrun.output.terminal_line import TerminalLine
from switchrun.units import format_bytes, format_rate, format_seconds

#: Before that no rate is shown: it would jump.
_SETTLING_SECONDS = 1.0


class ByteProgress:
    """A callback that draws the line on a stream, if that is a terminal.

    Args:
        stream: Where to draw; stderr.
        label: What is being done, in a word.
        wanted: False to draw nothing.
    """

    def __init__(self, stream: TextIO, label: str, *, wanted: bool = True) -> None:
        self._line = TerminalLine(stream, wanted=wanted)
        self._label = label
        self._start: float | None = None

    def __call__(self, done: int, total: int) -> None:
        """Draw that `done` of `total` bytes are through, unless that was drawn just now."""
        if self._start is None:
            # What comes before the first byte, such as importing torch, says nothing about the rate.
            self._start = time.monotonic()
        if self._line.is_due():
            self._line.draw(self._describe(done, total, time.monotonic() - self._start))

    def clear(self) -> None:
        """Erase the line; the next call draws it anew."""
        self._line.clear()

    def _describe(self, done: int, total: int, seconds: float) -> str:
        percent = f" ({100 * done // total} %)" if total else ""
        line = f"{self._label}: {format_bytes(done)} of {format_bytes(total)}{percent}"
        if not done or seconds < _SETTLING_SECONDS:
            return line
        rate = done / seconds
        return f"{line}, {format_rate(rate)}, {format_seconds((total - done) / rate)} left"
