"""One line on a terminal that tells what the session is doing, erased before anything else is written."""

from __future__ import annotations

import os
import shutil
import time
from typing import TextIO

from switchrun.model.records import Progress, Stage
from switchrun.units import format_bytes, format_rate

#: The line is drawn anew at most this often, in seconds: terminals are slow, and decoding should not wait for one.
REDRAW_SECONDS = 0.1

_ERASE = "\r\x1b[2K"
_UNITS: dict[Stage, str] = {"encode": "layers", "decode": "tokens"}


class ProgressLine:
    """A callback for a session that draws the line on a stream.

    On anything but a terminal that understands cursor codes it draws nothing. `FORCE_COLOR` is not asked: it would
    put cursor codes into files.

    Args:
        stream: Where to draw; stderr.
        wanted: False to draw nothing.
    """

    def __init__(self, stream: TextIO, *, wanted: bool = True) -> None:
        self._stream = stream
        self._enabled = wanted and stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False
        self._drawn_at = 0.0
        self._stage: Stage | None = None
        self._stage_at = 0.0
        self._stage_bytes = 0

    def __call__(self, progress: Progress) -> None:
        """Draw what the session tells."""
        if not self._enabled:
            return
        now = time.monotonic()
        if progress.stage != self._stage or progress.load_bytes < self._stage_bytes:
            self._stage, self._stage_at, self._stage_bytes = progress.stage, now, progress.load_bytes
        elif now - self._drawn_at < REDRAW_SECONDS:
            return
        self._drawn_at, self._shown = now, True
        line = self._describe(progress, now - self._stage_at)
        # One column is left free: a terminal would wrap after the last one.
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(_ERASE + line[:width])
        self._stream.flush()

    def clear(self) -> None:
        """Erase the line; the next call draws it anew."""
        if self._shown:
            self._stream.write(_ERASE)
            self._stream.flush()
        self._shown, self._drawn_at = False, 0.0

    def _describe(self, progress: Progress, seconds: float) -> str:
        if progress.stage == "open":
            return f"open: {format_bytes(progress.done)} of {format_bytes(progress.total)}"
        line = f"{progress.stage}: {progress.done} of {progress.total} {_UNITS[progress.stage]}"
        line += f", {format_bytes(progress.load_bytes)} read"
        read = progress.load_bytes - self._stage_bytes
        return f"{line}, {format_rate(read / seconds)}" if read and seconds > 0 else line
