"""`switchrun bench`: what a machine makes of a model: times, bytes, the disk's own speed beside them, memory."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from switchrun.checkpoint.types import HubWay
from switchrun.cli import options
from switchrun.cli.answering import EXIT_SOME_FAILED
from switchrun.cli.downloads import notes_of, open_for_processes
from switchrun.cli.help import Panel
from switchrun.cli.streams import write_answer
from switchrun.errors import SwitchrunError, UsageError
from switchrun.output.measurement_tables import BenchFormat, format_records
from switchrun.output.progress import ByteProgress, MeasurementProgress
from switchrun.output.sinks import format_record

Record = dict[str, Any]


def bench(
    context: typer.Context,
    model: options.Model = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[-qmoe][:experts=N]",
            show_default=False,
            help="Instead of a model: make a checkpoint of a published geometry with random weights, like "
            "switch-c-2048, base-128:experts=16 or switch-c-2048-qmoe, in the offload folder.",
        ),
    ] = None,
    materialize: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            show_default="none; qmoe: 64 experts a layer",
            rich_help_panel=Panel.MEASUREMENT,
            help="With --synthetic: so many bytes of experts are real, and only those are routed to. The others are "
            "holes, and reading them costs nothing.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(metavar="LIST", envvar="SWITCHRUN_DTYPE", help="What to compute in, like bf16 or bf16,fp32."),
    ] = "auto",
    cpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            envvar="SWITCHRUN_CPU_MEMORY",
            show_default="80 % of what is free",
            help="Memory that the process may use, like 4GiB or 4GiB,8GiB.",
        ),
    ] = None,
    gpu_memory: options.GpuMemory = None,
    offload_folder: options.OffloadFolder = None,
    hub: options.Hub = HubWay.AUTO,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            envvar="SWITCHRUN_BATCH_SIZE",
            rich_help_panel=Panel.MEMORY,
            help="Inputs filled together, like 1 or 1,8.",
        ),
    ] = "1",
    input_tokens: Annotated[
        int, typer.Option(metavar="N", min=2, rich_help_panel=Panel.MEASUREMENT, help="Tokens of each input.")
    ] = 24,
    output_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            rich_help_panel=Panel.MEASUREMENT,
            help="Tokens generated for each, no fewer and no more.",
        ),
    ] = 12,
    repeats: Annotated[
        int, typer.Option(metavar="N", min=1, rich_help_panel=Panel.MEASUREMENT, help="Measured fills of each cell.")
    ] = 3,
    warmup: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, rich_help_panel=Panel.MEASUREMENT, help="Fills before them that are thrown away."
        ),
    ] = 0,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold/--warm",
            rich_help_panel=Panel.MEASUREMENT,
            help="cold: each fill in a new process, the checkpoint not in the page cache; warm: all in one process "
            "that keeps its experts.",
        ),
    ] = True,
    seed: Annotated[
        int, typer.Option(metavar="N", min=0, rich_help_panel=Panel.MEASUREMENT, help="Decides the input's tokens.")
    ] = 0,
    style: Annotated[
        BenchFormat, typer.Option("--format", help="table, md: to read; json, jsonl, csv: to process.")
    ] = BenchFormat.TABLE,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            rich_help_panel=Panel.OUTPUT,
            help="Write a file too: .json, .jsonl, .csv or .md.",
        ),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            rich_help_panel=Panel.OUTPUT,
            help="Show ratios to earlier records, .json or .jsonl.",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            show_default=False,
            rich_help_panel=Panel.OUTPUT,
            help="Skip the cells that have a record there, and add each new one as soon as it is there.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            rich_help_panel=Panel.OUTPUT,
            help="Draw .png or .svg; needs the plot extra.",
        ),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE.html",
            show_default=False,
            rich_help_panel=Panel.OUTPUT,
            help="Write a page that says what limits, with pictures.",
        ),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", rich_help_panel=Panel.OUTPUT, help="No notes on stderr.")
    ] = False,
) -> None:
    """Measure how fast a model runs here.

    Every combination of the lists (--dtype, --cpu-memory, --batch-size) is a cell, measured in processes of its own.

    Examples:
        switchrun bench --model google/switch-base-8 --cpu-memory 2GiB,4GiB
        switchrun bench --synthetic base-128:experts=16 --dtype bf16,int8 --warm
        switchrun bench -m google/switch-base-8 --cold --report bench.html
    """
    from switchrun.bench.records import compare as compare_records
    from switchrun.bench.records import read_records
    from switchrun.bench.runner import Bench, Cell, product
    from switchrun.bench.synthetic import make_synthetic
    from switchrun.machine import folders
    from switchrun.planning.budgets import parse_gpu_memory, parse_size
    from switchrun.planning.options import OpenOptions

    if model is not None and synthetic is not None:
        if options.is_typed(context, "model"):
            raise UsageError("--model and --synthetic cannot be used together", "leave one of them out")
        model = None
    if materialize is not None and synthetic is None:
        raise UsageError("--materialize does nothing without --synthetic", "add --synthetic NAME")
    dtypes = options.dtype_list(dtype)
    memories: list[int | None] = [None]
    if cpu_memory is not None:
        memories = [parse_size("cpu_memory", size) for size in options.words("--cpu-memory", cpu_memory)]
    if gpu_memory is not None:
        parse_gpu_memory(gpu_memory)
    batches = [_batch(word) for word in options.words("--batch-size", batch_size)]
    first = Cell(
        model,
        gpu_memory=gpu_memory,
        hub=hub.value,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        repeats=repeats,
        warmup=warmup,
        cache="cold" if cold else "warm",
        seed=seed,
    )
    files = _Files(export, plot, page)
    files.check()
    old = read_records(compare) if compare else []
    finished = read_records(resume) if resume and resume.exists() else []
    folder = folders.offload_folder(offload_folder)
    progress = MeasurementProgress(sys.stderr, wanted=not quiet)
    tell = notes_of(progress, quiet)
    description = None
    if synthetic is not None:
        making = ByteProgress(sys.stderr, "make", wanted=not quiet)
        try:
            made = make_synthetic(synthetic, materialize, folder, notes_of(making, quiet), making)
        finally:
            making.clear()
        first, description = replace(first, model=str(made.path)), made.description
    opening = OpenOptions(model=first.model, offload_folder=folder, hub=hub.value)
    checkpoint = open_for_processes(opening, quiet=quiet)
    runner = Bench(checkpoint, folder, description, tell, progress.watch)
    records: list[Record] = []
    try:
        for record in runner.run(product(first, dtypes, memories, batches), finished):
            records.append(record)
            if resume and record not in finished:
                _write(resume, format_record(record, indent=False), "a")
    finally:
        progress.clear()
        # Also after a signal: what was finished is written.
        records = compare_records(records, old, compare.name) if compare else records
        if records:
            files.write(records)
            write_answer(format_records(records, style))
    failed = [record for record in records if record["status"] == "failed"]
    if failed:
        raise typer.Exit(EXIT_SOME_FAILED if len(failed) < len(records) else failed[0]["error"]["exit_code"])


@dataclass(frozen=True, slots=True)
class _Files:
    """Files to write besides the answer on stdout; None is no such file."""

    records: Path | None
    plot: Path | None
    page: Path | None

    def check(self) -> None:
        """Refuse what could not be written at the end, before hours of measuring."""
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
        if self.plot:
            from switchrun.output.bench_plot import check_matplotlib

            check_matplotlib()

    def write(self, records: Sequence[Record]) -> None:
        if self.records:
            _write(self.records, format_records(records, BenchFormat(self.records.suffix[1:])))
        if self.plot:
            from switchrun.output.bench_plot import draw

            draw(records, self.plot)
        if self.page:
            from switchrun.output.bench_report import render_page

            _write(self.page, render_page(records))


def _write(path: Path, text: str, mode: str = "w") -> None:
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise SwitchrunError(f"cannot write {path}: {error.strerror}") from error


def _batch(word: str) -> int:
    if not word.isdigit() or int(word) == 0:
        raise UsageError(f"--batch-size: '{word}' is not a number above 0", "write it like 1 or 1,8")
    return int(word)
