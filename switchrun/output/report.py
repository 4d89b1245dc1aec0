"""A page about benchmark records: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from switchrun.output.bench_tables import Section, sections
from switchrun.output.plots import draw_svg

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>switchrun bench</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; margin: 0 0 2rem; }}
caption {{ font-weight: bold; text-align: left; padding: .5rem 0; }}
th, td {{ text-align: left; padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }}
.number {{ text-align: right; white-space: nowrap; }}
svg {{ max-width: 100%; height: auto; }}
</style>
</head>
<body>
<h1>switchrun bench</h1>
{body}
</body>
</html>
"""


def render_page(records: Sequence[dict[str, Any]]) -> str:
    """Give the page: the tables of the command line, and the pictures."""
    tables = "\n".join(map(_table, sections(records)))
    return _PAGE.format(body=f"{draw_svg(records)}\n{tables}")


def _table(section: Section) -> str:
    lines = [f"<table><caption>{escape(section.title)}</caption>"]
    if any(section.head):
        lines.append(_row("th", section.head, section.text_columns))
    lines += [_row("td", row, section.text_columns) for row in section.rows]
    return "\n".join([*lines, "</table>"])


def _row(tag: str, cells: Sequence[str], text_columns: int) -> str:
    parts = []
    for position, cell in enumerate(cells):
        kind = ' class="number"' if position >= text_columns else ""
        parts.append(f"<{tag}{kind}>{escape(cell)}</{tag}>")
    return f"<tr>{''.join(parts)}</tr>"
