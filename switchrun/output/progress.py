"""The line at the bottom of a terminal that shows how far the work is, erased before anything else is written."""

from __future__ import annotations

import os
import shutil
import time
from typing import TextIO

from switchrun.model.records import Progress, Stage
from switchrun.units import format_bytes, format_rate, format_seconds

#: The line is drawn at most this often, in seconds: terminals are slow, and the work should not wait for one.
REDRAW_SECONDS = 0.1
#: Before that no rate of bytes is shown: it would jump.
_SETTLING_SECONDS = 1.0

_ERASE = "\r\x1b[2K"
_UNITS: dict[Stage, str] = {"encode": "layers", "decode": "tokens"}


class _Line:
    """Draws a line over and over, on nothing but a terminal that understands cursor codes.

    `FORCE_COLOR` is not asked, as rich would: it would put cursor codes into files.

    Args:
        stream: Where to draw; stderr.
        wanted: False to draw nothing.
    """

    def __init__(self, stream: TextIO, *, wanted: bool = True) -> None:
        self._stream = stream
        self._enabled = wanted and stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False
        self._drawn_at = 0.0

    def clear(self) -> None:
        """Erase the line; the next call draws it at once."""
        if self._shown:
            self._stream.write(_ERASE)
            self._stream.flush()
        self._shown, self._drawn_at = False, 0.0

    def _is_due(self) -> bool:
        return self._enabled and time.monotonic() - self._drawn_at >= REDRAW_SECONDS

    def _draw(self, line: str) -> None:
        self._drawn_at, self._shown = time.monotonic(), True
        # One column is left free: a terminal would wrap after the last one.
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(_ERASE + line[:width])
        self._stream.flush()


class SessionProgress(_Line):
    """A callback for a session: the stage, how far it is, and how fast it reads.

    `expected_hub_bytes` is what is expected to come from the Hub until the first fill is done; 0 if nothing is.
    """

    expected_hub_bytes = 0
    _stage: Stage | None = None
    _stage_at = 0.0
    _stage_bytes = 0
    _stage_hub_bytes = 0

    def __call__(self, progress: Progress) -> None:
        """Draw it, if the stage is another or the last drawing is long enough ago."""
        now = time.monotonic()
        changed = progress.stage != self._stage or progress.load_bytes < self._stage_bytes
        if changed:
            self._stage, self._stage_at, self._stage_bytes = progress.stage, now, progress.load_bytes
            self._stage_hub_bytes = progress.hub_bytes
        if self._enabled and (changed or self._is_due()):
            self._draw(self._describe(progress, now - self._stage_at))

    def _describe(self, progress: Progress, seconds: float) -> str:
        stage, fetched = progress.stage, progress.hub_bytes
        rate = (fetched - self._stage_hub_bytes) / seconds if seconds > 0 else 0.0
        if stage in ("fetch", "open"):
            line = f"{stage}: {format_bytes(progress.done)} of {format_bytes(progress.total)}"
            return line if stage == "open" else line + _rest(progress.total - progress.done, rate)
        line = f"{stage}: {progress.done} of {progress.total} {_UNITS[stage]}"
        if rate:
            left = self.expected_hub_bytes - fetched
            expected = f" of ~{format_bytes(self.expected_hub_bytes)}" if left > 0 else ""
            return f"{line}, {format_bytes(fetched)}{expected} fetched{_rest(left, rate)}"
        line += f", {format_bytes(progress.load_bytes)} read"
        read = progress.load_bytes - self._stage_bytes
        return f"{line}, {format_rate(read / seconds)}" if read and seconds > 0 else line


class ByteProgress(_Line):
    """A callback for work that is counted in bytes: how much is done, how fast, and how long it will take.

    Args:
        stream: Where to draw; stderr.
        label: What is being done, in a word.
        wanted: False to draw nothing.
    """

    def __init__(self, stream: TextIO, label: str, *, wanted: bool = True) -> None:
        super().__init__(stream, wanted=wanted)
        self._label = label
        self._start: float | None = None

    def __call__(self, done: int, total: int) -> None:
        """Draw that `done` of `total` bytes are through, unless that was drawn just now."""
        if self._start is None:
            # What comes before the first byte, such as importing torch, says nothing about the rate.
            self._start = time.monotonic()
        if self._is_due():
            self._draw(self._describe(done, total, time.monotonic() - self._start))

    def _describe(self, done: int, total: int, seconds: float) -> str:
        percent = f" ({100 * done // total} %)" if total else ""
        line = f"{self._label}: {format_bytes(done)} of {format_bytes(total)}{percent}"
        if not done or seconds < _SETTLING_SECONDS:
            return line
        return line + _rest(total - done, done / seconds)


class InputProgress(SessionProgress):
    """A callback for a session that answers a file: how many inputs are through, how fast, and how long it will take.

    Args:
        stream: Where to draw; stderr.
        total: How many inputs there are.
        done: How many were through before.
        wanted: False to draw nothing.
    """

    def __init__(self, stream: TextIO, total: int, done: int, *, wanted: bool = True) -> None:
        super().__init__(stream, wanted=wanted)
        self.done = done
        self._total, self._before = total, done
        self._start: float | None = None

    def __call__(self, progress: Progress) -> None:
        """As `SessionProgress`; but how far a batch is comes last, and how long it took to open does not count."""
        if progress.stage not in ("fetch", "open") and self._start is None:
            self._start = time.monotonic()
        super().__call__(progress)

    def describe(self) -> str:
        """Say how far it is."""
        line = f"{self.done:,} of {self._total:,} inputs ({100 * self.done // max(1, self._total)} %)"
        seconds = 0.0 if self._start is None else time.monotonic() - self._start
        if self.done == self._before or seconds < _SETTLING_SECONDS:
            return line
        each, left = seconds / (self.done - self._before), self._total - self.done
        rate = f"{1 / each:.1f} inputs/s" if each < 1 else f"{format_seconds(each)} an input"
        return f"{line}, {rate}" + (f", {format_seconds(left * each)} left" if left else "")

    def _describe(self, progress: Progress, seconds: float) -> str:
        line = super()._describe(progress, seconds)
        return line if progress.stage in ("fetch", "open") else f"{self.describe()}; {line}"


def _rest(left: int, rate: float) -> str:
    """Write how fast bytes come, and how long the others will take, as far as that is known."""
    if not rate:
        return ""
    return f", {format_rate(rate)}" + (f", {format_seconds(left / rate)} left" if left > 0 else "")
