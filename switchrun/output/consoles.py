"""Tables for consoles, in which no word is cut in two.

In a pipe a line is as long as it must be. On a terminal prose is wrapped at words, columns of numbers for which there
is no room go into a block below, and a word that is too long, mostly a path, stands whole on a line of its own.
"""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TextIO

from rich.console import Console
from rich.text import Text

from switchrun.errors import escape

_GAP = "  "
#: Columns of a terminal that does not say how many it has, and of the longest rule below a head in a pipe.
_DEFAULT = 80
#: The part of the width that a column of text keeps, if it needs it, where there is little room.
_LEAST_SHARE = 4


def render(stream: TextIO | None, parts: Iterable[Table | str]) -> str:
    """Draw tables and lines of text, with an empty line between them, as lines to be written to a stream.

    Codes in them that a terminal would obey are written out.

    `NO_COLOR` and `COLUMNS` are honoured. `FORCE_COLOR` is not: it would put colours into files.

    Args:
        stream: Where the lines will go; it is only asked whether it is a terminal. None is one that is closed.
        parts: What to draw.
    """
    terminal, width = stream is not None and stream.isatty(), _columns(stream)
    console = Console(
        file=stream, force_terminal=terminal, width=width or _DEFAULT, highlight=False, markup=False, emoji=False
    )
    with console.capture() as capture:
        for position, part in enumerate(parts):
            if position:
                console.print()
            for line in _wrap(Text(escape(part)), width) if isinstance(part, str) else part.lines(width):
                console.print(line, soft_wrap=True)
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


def _columns(stream: TextIO | None) -> int | None:
    """Return how wide lines may be; None is no limit."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdigit() and int(columns):
        return int(columns)
    if stream is None or not stream.isatty():
        return None
    with contextlib.suppress(OSError):
        return os.get_terminal_size(stream.fileno()).columns or _DEFAULT
    return _DEFAULT


@dataclass(slots=True)
class Table:
    """Rows below a head, which may be empty: some columns of text, then numbers, aligned to the right."""

    title: Text
    head: list[Text]
    text_columns: int
    rows: list[list[Text]] = field(default_factory=list)

    def add_row(self, *cells: str | Text) -> None:
        """Add a row, with a cell for each column."""
        self.rows.append([_as_text(cell) for cell in cells])

    def lines(self, width: int | None) -> Iterator[Text]:
        """Yield the lines, none longer than a width unless a word is; None is no limit."""
        yield from _wrap(self.title, width)
        texts, numbers = list(range(self.text_columns)), list(range(self.text_columns, len(self.head)))
        while True:
            count = len(numbers)
            while count > 1 and not self._fits(texts + numbers[:count], width):
                count -= 1
            columns = texts + numbers[:count]
            widths = self._widths(columns, width)
            if any(name.plain for name in self.head):
                yield from self._row(self.head, columns, widths, width)
                yield Text("─" * min(_total(widths), width or _DEFAULT))
            for row in self.rows:
                yield from self._row(row, columns, widths, width)
            numbers = numbers[count:]
            if not numbers:
                return
            yield Text()

    def _fits(self, columns: Sequence[int], width: int | None) -> bool:
        return width is None or _total(self._widths(columns, width)) <= width

    def _widths(self, columns: Sequence[int], width: int | None) -> list[int]:
        """Return widths for some columns, in all no more than there is room for, if that can be had."""
        wanted = [max(_width(row[column]) for row in (self.head, *self.rows)) for column in columns]
        least = [min(want, self._least(column, width or 0)) for want, column in zip(wanted, columns, strict=True)]
        while width is not None and _total(wanted) > width and wanted != least:
            place = max(range(len(columns)), key=lambda place: wanted[place] * (wanted[place] > least[place]))
            wanted[place] -= 1
        return wanted

    def _least(self, column: int, width: int) -> int:
        """Return the width below which a column cannot go: numbers are never wrapped, their heads are."""
        if column < self.text_columns:
            return max(width // _LEAST_SHARE, _longest_word(self.head[column]))
        return max(_longest_word(self.head[column]), *(_width(row[column]) for row in self.rows), 0)

    def _row(self, row: list[Text], columns: Sequence[int], widths: Sequence[int], width: int | None) -> Iterator[Text]:
        cells: list[list[Text]] = []
        for column, room in zip(columns, widths, strict=True):
            cell, is_text = row[column], column < self.text_columns
            if is_text and _longest_word(cell) > room:
                yield from _side_by_side(cells)
                yield from (Text.assemble(_GAP, line) for line in _wrap(cell, width and width - len(_GAP)))
                cells = [[Text(" " * above)] for above in widths[: len(cells) + 1]]
                continue
            lines = _wrap(cell, None if width is None else room)
            for line in lines:
                line.align("left" if is_text else "right", room)
            cells.append(lines)
        yield from _side_by_side(cells)


def _side_by_side(cells: Sequence[Sequence[Text]]) -> Iterator[Text]:
    """Yield the lines of cells that are padded to the widths of their columns, unless there is nothing in them."""
    if any(line.plain.strip() for lines in cells for line in lines):
        blanks = [Text(" " * lines[0].cell_len) for lines in cells]
        for parts in zip_longest(*cells):
            yield Text(_GAP).join(part or blank for part, blank in zip(parts, blanks, strict=True))


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _wrap(text: Text, width: int | None) -> list[Text]:
    """Return the lines of a text, wrapped at spaces alone."""
    lines = text.plain.split("\n")
    if width is not None and not text.no_wrap:
        wrapper = textwrap.TextWrapper(max(width, 1), break_long_words=False, break_on_hyphens=False)
        lines = [part for line in lines for part in wrapper.wrap(line) or [""]]
    return [Text(line, style=text.style) for line in lines]


def _width(text: Text) -> int:
    return max(line.cell_len for line in text.split("\n", allow_blank=True))


def _longest_word(text: Text) -> int:
    words = [text.plain] if text.no_wrap else text.plain.split()
    return max((Text(word).cell_len for word in words), default=0)


def make_table(title: str | Text, *columns: str, text_columns: int = 1) -> Table:
    """Return an empty table whose first columns are text, and the others numbers, aligned to the right."""
    bold = _as_text(title)
    bold.style = "bold"
    return Table(bold, [Text(escape(column)) for column in columns], text_columns)


def _as_text(cell: str | Text) -> Text:
    return Text(escape(cell)) if isinstance(cell, str) else cell


def whole(name: str) -> Text:
    """Return a path or a name for a cell, to be kept on one line though it may have spaces."""
    return Text(escape(name), no_wrap=True)


def make_list(title: str, rows: Iterable[tuple[str, str | Text]]) -> Table:
    """Return a table of two columns without a head: what it is, and how much."""
    table = make_table(title, "", "", text_columns=2)
    for row in rows:
        table.add_row(*row)
    return table
