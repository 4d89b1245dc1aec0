"""The progress line of a session: what it is doing, how far it is, and how fast it reads."""

from __future__ import annotations

import time
from typing import TextIO

from switchrun.model.records import Progress, Stage
from switchrun.output.terminal_line import TerminalLine
from switchrun.units import format_bytes, format_rate

_UNITS: dict[Stage, str] = {"encode": "layers", "decode": "tokens"}


class ProgressLine:
    """A callback for a session that draws the line on a stream, if that is a terminal.

    Args:
        stream: Where to draw; stderr.
        wanted: False to draw nothing.
    """

    def __init__(self, stream: TextIO, *, wanted: bool = True) -> None:
        self._line = TerminalLine(stream, wanted=wanted)
        self._stage: Stage | None = None
        self._stage_at = 0.0
        self._stage_bytes = 0

    def __call__(self, progress: Progress) -> None:
        """Draw what the session tells."""
        if not self._line.enabled:
            return
        now = time.monotonic()
        changed = progress.stage != self._stage or progress.load_bytes < self._stage_bytes
        if changed:
            self._stage, self._stage_at, self._stage_bytes = progress.stage, now, progress.load_bytes
        if changed or self._line.is_due():
            self._line.draw(self._describe(progress, now - self._stage_at))

    def clear(self) -> None:
        """Erase the line; the next call draws it anew."""
        self._line.clear()

    def _describe(self, progress: Progress, seconds: float) -> str:
        if progress.stage == "open":
            return f"open: {format_bytes(progress.done)} of {format_bytes(progress.total)}"
        line = f"{progress.stage}: {progress.done} of {progress.total} {_UNITS[progress.stage]}"
        line += f", {format_bytes(progress.load_bytes)} read"
        read = progress.load_bytes - self._stage_bytes
        return f"{line}, {format_rate(read / seconds)}" if read and seconds > 0 else line
