"""The run behind `switchrun bench`: cells in, records out, whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from switchrun.bench.cells import Cell
from switchrun.cli.fill import EXIT_SOME_FAILED
from switchrun.cli.streams import write_answer
from switchrun.errors import SwitchrunError, UsageError
from switchrun.output.bench_tables import BenchFormat, format_records
from switchrun.output.sinks import format_record

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Exports:
    """Files to write besides the answer on stdout; None is no such file."""

    records: Path | None
    plot: Path | None
    page: Path | None

    def check(self) -> None:
        """Refuse what could not be written at the end, before hours of measuring.

        Raises:
            UsageError: An ending that is not known, a folder that is not there, or matplotlib is missing.
        """
        endings = (
            (self.records, [f".{style}" for style in BenchFormat if style is not BenchFormat.TABLE]),
            (self.plot, [".png", ".svg"]),
            (self.page, [".html"]),
        )
        for path, known in endings:
            if path is None:
                continue
            if path.suffix not in known:
                raise UsageError(f"'{path}' has an ending that is not known", f"use {', '.join(known)}")
            if not path.parent.is_dir():
                raise UsageError(f"there is no folder '{path.parent}'", "make it first")
        if self.plot or self.page:
            from switchrun.output.plots import check_matplotlib

            check_matplotlib()

    def write(self, records: Sequence[Record]) -> None:
        """Write the files."""
        if self.records:
            _write(self.records, format_records(records, BenchFormat(self.records.suffix[1:])))
        if self.plot:
            from switchrun.output.plots import draw

            draw(records, self.plot)
        if self.page:
            from switchrun.output.report import render_page

            _write(self.page, render_page(records))


@dataclass(frozen=True, slots=True)
class BenchOutput:
    """Where records go, and what they are held against.

    Attributes:
        style: Format of the answer on stdout.
        exports: Files besides.
        compare: Earlier records to give ratios to.
        resume: Records that need not be made again; new ones are added there at once.
    """

    style: BenchFormat
    exports: Exports
    compare: Path | None
    resume: Path | None


def bench_cells(
    cells: Sequence[Cell],
    output: BenchOutput,
    offload_folder: Path | None,
    synthetic: str | None,
    materialize: str | None,
    baseline_timeout: float,
    tell: Callable[[str], None],
) -> int:
    """Measure cells and write their records; those that are finished are written also after a signal.

    Args:
        cells: What to measure.
        output: Where to.
        offload_folder: As `--offload-folder` has it.
        synthetic: The geometry to make, as `--synthetic` has it; None is the cells' own model.
        materialize: As `--materialize` has it.
        baseline_timeout: Seconds for each process of the baseline.
        tell: Called with a line for a human now and then.

    Returns:
        The exit code.

    Raises:
        SwitchrunError: Nothing could be measured at all.
        Interrupted: A signal came; what was finished is written.
    """
    from switchrun.bench.records import compare, read_records
    from switchrun.bench.runner import Bench
    from switchrun.checkpoint import open_checkpoint
    from switchrun.machine import folders

    output.exports.check()
    old = read_records(output.compare) if output.compare else []
    finished = read_records(output.resume) if output.resume and output.resume.exists() else []
    folder = folders.offload_folder(offload_folder)
    description = None
    if synthetic is not None:
        from switchrun.bench.synthetic_model import make_synthetic

        made = make_synthetic(synthetic, materialize, folder, tell)
        cells = [replace(cell, model=str(made.path)) for cell in cells]
        description = made.description
        tell(f"note: {description['note']}")
    checkpoint = open_checkpoint(cells[0].model, cache_dir=folder / "index")
    bench = Bench(checkpoint, folder, description, baseline_timeout, tell)
    records: list[Record] = []
    try:
        for record in bench.run(cells, finished):
            records.append(record)
            if output.resume and record not in finished:
                _append(output.resume, format_record(record, indent=False))
    finally:
        records = compare(records, old, output.compare.name) if output.compare else records
        if records:
            output.exports.write(records)
            write_answer(format_records(records, output.style))
    return _exit_code(records)


def _exit_code(records: Sequence[Record]) -> int:
    failed = [record for record in records if record["status"] == "failed"]
    if not failed:
        return 0
    return EXIT_SOME_FAILED if len(failed) < len(records) else int(failed[0]["error"]["exit_code"])


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SwitchrunError(f"cannot write {path}: {error.strerror}") from error


def _append(path: Path, text: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise SwitchrunError(f"cannot write {path}: {error.strerror}") from error
