"""Consoles for tables: no colour and a fixed width where nobody looks at a terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table

from switchrun.errors import escape

#: Of what is not a terminal, unless COLUMNS says otherwise.
DEFAULT_WIDTH = 80


def render(stream: TextIO | None, parts: Iterable[RenderableType]) -> str:
    """Draw tables and lines of text, with an empty line between them, as lines to be written to a stream.

    Codes in them that a terminal would obey are written out.

    `NO_COLOR` and `COLUMNS` are honoured. `FORCE_COLOR` is not: it would put colours into files.

    Args:
        stream: Where the lines will go; it is only asked whether it is a terminal. None is one that is closed.
        parts: What to draw.
    """
    terminal = stream is not None and stream.isatty()
    columns = os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdigit() and int(columns) else None if terminal else DEFAULT_WIDTH
    console = Console(file=stream, force_terminal=terminal, width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as capture:
        for position, part in enumerate(parts):
            if position:
                console.print()
            console.print(escape(part) if isinstance(part, str) else part)
    return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())


class _Table(Table):
    """A table that a terminal shows as it is, whatever names its cells hold."""

    def add_row(self, *cells: RenderableType | None, **settings: Any) -> None:
        super().add_row(*(escape(cell) if isinstance(cell, str) else cell for cell in cells), **settings)


def make_table(title: str, *columns: str, text_columns: int = 1) -> Table:
    """Return an empty table whose first columns are text, and the others numbers, aligned to the right."""
    table = _Table(
        title=escape(title),
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for position, column in enumerate(columns):
        number = position >= text_columns
        table.add_column(escape(column), justify="right" if number else "left", overflow="fold")
    return table


def make_list(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Return a table of two columns without a head: what it is, and how much."""
    table = make_table(title, "", "", text_columns=2)
    table.show_header = False
    for row in rows:
        table.add_row(*row)
    return table
