"""Benchmark records as a picture, by matplotlib: where the time went, bytes and hits, memory, and experts used."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchrun.bench.records import Record, label, median
from switchrun.errors import SwitchrunError, UsageError, printable
from switchrun.units import GIB, MIB

_STAGES = (
    ("open_seconds", "open"),
    ("wait_seconds", "waiting for experts"),
    ("expert_seconds", "computing experts"),
    ("dense_seconds", "all else"),
)
#: More columns than this would be narrower than a pixel, and those of single experts would be lost.
_MOST_COLUMNS = 256


def check_matplotlib() -> None:
    """Make sure, without importing it, that pictures can be drawn.

    Raises:
        UsageError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib", "pip install 'switchrun[plot]'")


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


def _figure(records: Sequence[Record]) -> Any:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    measured = [record for record in records if record["status"] == "ok"]
    if not measured:
        return None
    mpl.rcdefaults()  # a matplotlibrc in the current folder could have programs run: LaTeX, with words of its own
    with mpl.rc_context({"font.size": 8, "svg.fonttype": "none"}):
        # A line of text for each layer.
        maps = [1.0 + 0.16 * len(record["expert_use"]) for record in measured]
        figure = Figure(figsize=(11, 6 + sum(maps)), layout="constrained")
        grid = figure.add_gridspec(2 + len(measured), 2, height_ratios=[3, 3, *maps])
        labels = [f"{number}: {label(record)}" for number, record in enumerate(measured, 1)]
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


def _stages(axes: Any, records: Sequence[Record], labels: Sequence[str]) -> None:
    left = [0.0] * len(records)
    for name, stage in _STAGES:
        widths = [median(record, name) for record in records]
        axes.barh(labels, widths, left=left, label=stage)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set(title="Time by stage (medians)", xlabel="seconds")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=len(_STAGES))


def _bytes(axes: Any, records: Sequence[Record], labels: Sequence[str]) -> None:
    values = [median(record, "load_bytes") for record in records]
    unit, name = (GIB, "GiB") if max(values) >= GIB else (MIB, "MiB")
    bars = axes.barh(labels, [value / unit for value in values])
    axes.bar_label(bars, [f"{median(record, 'hit_rate'):.0%} hits" for record in records], padding=3)
    axes.set(title="Experts read, and hit rate (medians)", xlabel=name)
    axes.invert_yaxis()
    axes.margins(x=0.2)


def _memory(axes: Any, records: Sequence[Record], labels: Sequence[str]) -> None:
    for record, name in zip(records, labels, strict=True):
        points = record["memory_timeline"]
        (line,) = axes.plot([age for age, _ in points], [size / GIB for _, size in points], label=name)
        axes.axvline(record["metrics"]["open_seconds"]["samples"][0], color=line.get_color(), linestyle=":")
    axes.set(
        title="Memory of the first process, up to the end of its first fill (dotted: open)",
        xlabel="seconds since it was started",
        ylabel="resident set, GiB",
    )
    axes.set_ylim(bottom=0)
    axes.legend()


def _heat(figure: Any, axes: Any, record: Record, name: str) -> None:
    use = record["expert_use"]
    experts = record["plan"]["experts_per_layer"]
    rows = [[0] * min(experts, _MOST_COLUMNS) for _ in use]
    for row, layer in zip(rows, use.values(), strict=True):
        for expert, count in layer.items():
            place = int(expert) * len(row) // experts
            row[place] = max(row[place], count)
    extent = (-0.5, experts - 0.5, len(use) - 0.5, -0.5)
    image = axes.imshow(rows, aspect="auto", interpolation="nearest", cmap="viridis", extent=extent)
    figure.colorbar(image, ax=axes, label="steps that used it")
    axes.set(title=f"Experts used in the first fill, cell {name}", xlabel="expert", yticks=range(len(use)))
    axes.set_yticklabels(list(use))
