"""Benchmark records as pictures, and as a page: one HTML file that needs nothing else.

The pictures show where the time went, bytes and hits, memory over time, and which experts were used.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from switchrun.errors import SwitchrunError, UsageError, printable
from switchrun.output.measurement_tables import Section, sections
from switchrun.units import GIB, MIB

Record = dict[str, Any]

_STAGES = (
    ("open_seconds", "open"),
    ("wait_seconds", "waiting for disk"),
    ("expert_seconds", "computing experts"),
    ("dense_seconds", "dense and other"),
)

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


def check_matplotlib() -> None:
    """Make sure, without importing it, that pictures can be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot and --report need matplotlib", "pip install 'switchrun[plot]'")


def draw(records: Sequence[Record], path: Path) -> None:
    """Draw the cells that were measured into a file, .png or .svg; nothing if there is none.

    Raises:
        SwitchrunError: The file cannot be written.
    """
    figure = _figure(records)
    if figure is not None:
        try:
            figure.savefig(path, dpi=120)
        except OSError as error:
            raise SwitchrunError(f"cannot write {path}: {error.strerror}") from error


def render_page(records: Sequence[dict[str, Any]]) -> str:
    """Return the page: the tables of the command line, and the pictures."""
    tables = "\n".join(map(_table, sections(records)))
    return _PAGE.format(body=f"{_draw_svg(records)}\n{tables}")


def _draw_svg(records: Sequence[Record]) -> str:
    """Return the picture as an SVG element; empty if no cell was measured."""
    figure = _figure(records)
    if figure is None:
        return ""
    text = io.StringIO()
    figure.savefig(text, format="svg")
    # Without the XML head, which has no place inside a page.
    return text.getvalue()[text.getvalue().index("<svg") :]


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
        parts.append(f"<{tag}{kind}>{escape(printable(cell))}</{tag}>")
    return f"<tr>{''.join(parts)}</tr>"


def _figure(records: Sequence[Record]) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    measured = [record for record in records if record["status"] == "ok"]
    if not measured:
        return None
    mpl.rcdefaults()  # a matplotlibrc in the current folder could have programs run: LaTeX, with words of its own
    with mpl.rc_context({"font.size": 8, "svg.fonttype": "none"}):
        figure = Figure(figsize=(11, 6 + 2.6 * len(measured)), layout="constrained")
        grid = figure.add_gridspec(2 + len(measured), 2)
        labels = [_label(number, record) for number, record in enumerate(measured, 1)]
        _stages(figure.add_subplot(grid[0, 0]), measured, labels)
        _bytes(figure.add_subplot(grid[0, 1]), measured, labels)
        _memory(figure.add_subplot(grid[1, :]), measured, labels)
        for number, record in enumerate(measured):
            _heat(figure, figure.add_subplot(grid[2 + number, :]), record, labels[number])
        figure.suptitle(_title(measured[0]))
    return figure


def _title(record: Record) -> str:
    name = record["knobs"]["model"] or "demo"
    shown = printable(Path(name).name).replace("$", r"\$")  # which would begin a formula
    return f"{shown}{' (synthetic weights)' if record['synthetic'] else ''}, switchrun bench"


def _label(number: int, record: Record) -> str:
    knobs = record["knobs"]
    memory = "" if knobs["cpu_memory_bytes"] is None else f", {knobs['cpu_memory_bytes'] / GIB:.3g} GiB"
    return f"{number}: {record['plan']['dtype']}{memory}, batch {knobs['batch_size']}"


def _median(record: Record, name: str) -> float:
    summary = record["metrics"].get(name)
    return float(summary["median"]) if summary else 0.0


def _stages(axes: Any, records: Sequence[Record], labels: Sequence[str]) -> None:
    left = [0.0] * len(records)
    for name, label in _STAGES:
        widths = [_median(record, name) for record in records]
        axes.barh(labels, widths, left=left, label=label)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set(title="Time by stage (medians)", xlabel="seconds")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(_STAGES))


def _bytes(axes: Any, records: Sequence[Record], labels: Sequence[str]) -> None:
    values = [_median(record, "load_bytes") for record in records]
    unit, name = (GIB, "GiB") if max(values) >= GIB else (MIB, "MiB")
    bars = axes.barh(labels, [value / unit for value in values])
    axes.bar_label(bars, [f"{_median(record, 'hit_rate'):.0%} hits" for record in records], padding=3)
    axes.set(title="Experts read, and hit rate (medians)", xlabel=name)
    axes.invert_yaxis()
    axes.margins(x=0.2)


def _memory(axes: Any, records: Sequence[Record], labels: Sequence[str]) -> None:
    for record, label in zip(records, labels, strict=True):
        points = record["memory_timeline"]
        (line,) = axes.plot([age for age, _ in points], [size / GIB for _, size in points], label=label)
        axes.axvline(record["metrics"]["open_seconds"]["samples"][0], color=line.get_color(), linestyle=":")
    axes.set(
        title="Memory of the first process, up to the end of its first fill (dotted: open)",
        xlabel="seconds since it was started",
        ylabel="resident set, GiB",
    )
    axes.set_ylim(bottom=0)
    axes.legend()


def _heat(figure: Any, axes: Any, record: Record, label: str) -> None:
    use = record["expert_use"]
    experts = range(record["plan"]["experts_per_layer"])
    rows = [[layer.get(str(expert), 0) for expert in experts] for layer in use.values()]
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis")
    figure.colorbar(image, ax=axes, label="steps that used it")
    axes.set(title=f"Experts used in the first fill, cell {label}", xlabel="expert", yticks=range(len(use)))
    axes.set_yticklabels(list(use))
