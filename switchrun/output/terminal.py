"""What a stream shows: whether it is a terminal that takes cursor codes, or colours, and how wide a text is there."""

from __future__ import annotations

import os
import unicodedata
from contextlib import suppress
from typing import TextIO


def obeys_codes(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that moves its cursor when it is told to.

    `FORCE_COLOR` is not asked, as rich would: it would put codes into files.
    """
    return stream is not None and stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def takes_colours(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that shows colours, and `NO_COLOR` does not forbid it."""
    return obeys_codes(stream) and not os.environ.get("NO_COLOR")


def columns_of(stream: TextIO) -> int:
    """Return how wide a terminal is: as `COLUMNS` says, else as it says itself, else 80."""
    given = os.environ.get("COLUMNS", "")
    with suppress(OSError, ValueError):
        return int(given) if given.isdigit() and int(given) else os.get_terminal_size(stream.fileno()).columns or 80
    return 80


def width(text: str) -> int:
    """Return how many columns a text takes: two for a wide character, none for a mark on another one."""
    return sum(map(_columns, text))


def cut(text: str, columns: int) -> str:
    """Return a text that takes so many columns at most, with `…` in the place of what is left out."""
    if width(text) <= columns:
        return text
    kept, taken = "", 1
    for character in text:
        taken += _columns(character)
        if taken > columns:
            break
        kept += character
    return kept + "…"


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
