"""One line at the bottom of a terminal that is drawn over and over, and erased before anything else is written."""

from __future__ import annotations

import os
import shutil
import time
from typing import TextIO

#: The line is drawn anew at most this often, in seconds: terminals are slow, and the work should not wait for one.
REDRAW_SECONDS = 0.1

_ERASE = "\r\x1b[2K"


class TerminalLine:
    """Draws the line on a stream.

    On anything but a terminal that understands cursor codes it draws nothing. `FORCE_COLOR` is not asked: it would
    put cursor codes into files.

    Args:
        stream: Where to draw; stderr.
        wanted: False to draw nothing.

    Attributes:
        enabled: Whether anything is drawn at all.
    """

    def __init__(self, stream: TextIO, *, wanted: bool = True) -> None:
        self._stream = stream
        self.enabled = wanted and stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False
        self._drawn_at = 0.0

    def is_due(self) -> bool:
        """Tell whether the last drawing is long enough ago."""
        return self.enabled and time.monotonic() - self._drawn_at >= REDRAW_SECONDS

    def draw(self, line: str) -> None:
        """Put another text in the place of what is shown."""
        if not self.enabled:
            return
        self._drawn_at, self._shown = time.monotonic(), True
        # One column is left free: a terminal would wrap after the last one.
        width = shutil.get_terminal_size().columns - 1
        self._stream.write(_ERASE + line[:width])
        self._stream.flush()

    def clear(self) -> None:
        """Erase the line; the next one is due at once."""
        if self._shown:
            self._stream.write(_ERASE)
            self._stream.flush()
        self._shown, self._drawn_at = False, 0.0
