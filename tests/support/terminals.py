"""A terminal of some width for the command in a process of its own, and what is to be seen on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from types import TracebackType


class Terminal:
    """A pseudo-terminal: `theirs` is the command's end, which it has alone once it is closed here.

    Attributes:
        seen: All that came so far.
    """

    def __init__(self, columns: int = 80) -> None:
        self._ours, self.theirs = pty.openpty()
        self.seen = b""
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._ours)
        os.close(self.theirs)

    def type(self, text: bytes) -> None:
        os.write(self._ours, text)

    def wait_for(self, text: bytes, times: int = 1) -> None:
        """Read until a text has come so often."""
        end = time.monotonic() + 60
        while self.seen.count(text) < times:
            assert time.monotonic() < end, self.seen
            self.read(0.1)

    def read(self, seconds: float = 0.0) -> bytes:
        """Read what there is, and what comes in so many seconds; return all that was seen."""
        while select.select([self._ours], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                self.seen += os.read(self._ours, 4096)
                seconds = 0.0
        return self.seen

    def wait_for_editing(self) -> None:
        """Wait until a program edits lines: before that, Ctrl-D would be the terminal's own."""
        end = time.monotonic() + 60
        while self.echoes:
            assert time.monotonic() < end, self.seen
            self.read(0.01)

    @property
    def echoes(self) -> bool:
        """Whether what is typed is shown, as it is when no program edits lines."""
        return bool(termios.tcgetattr(self.theirs)[3] & termios.ECHO)


def lines_drawn(seen: bytes) -> list[str]:
    """Return every progress line that was drawn, in order."""
    return re.findall(r"\r\x1b\[2K([^\r\n\x1b]+)(?=\r\x1b\[2K)", seen.decode())


def left_on_screen(seen: bytes) -> bytes:
    """Return what is left once the erased parts are gone."""
    return re.sub(rb"[^\n]*\r\x1b\[2K", b"", seen).replace(b"\r\n", b"\n")
