"""`switchrun bench`: what a machine makes of a model: times, bytes, the disk's own speed beside them, memory."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from switchrun.cli import options
from switchrun.cli.bench_run import BenchOutput, Exports, bench_cells
from switchrun.cli.streams import report
from switchrun.errors import UsageError
from switchrun.output.bench_tables import BenchFormat


class BaselineChoice(StrEnum):
    """What `switchrun bench --baseline` takes."""

    ACCELERATE = "accelerate"


def bench(
    model: options.Model = None,
    synthetic: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[:experts=N]",
            show_default=False,
            help="Instead of a model: make a checkpoint of a published geometry with random weights, like "
            "switch-c-2048 or base-128:experts=16, in the offload folder.",
        ),
    ] = None,
    materialize: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            show_default="none: they are holes, and reading them costs nothing",
            help="With --synthetic: so many bytes of experts are real, and only those are routed to.",
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
    batch_size: Annotated[
        str, typer.Option(metavar="LIST", envvar="SWITCHRUN_BATCH_SIZE", help="Inputs filled together, like 1 or 1,8.")
    ] = "1",
    input_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each input.")] = 24,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for each, no fewer and no more.")] = 12,
    repeats: Annotated[int, typer.Option(min=1, help="Measured fills of each cell.")] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Fills before them that are thrown away.")] = 0,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold/--warm",
            help="cold: each fill in a new process, the checkpoint not in the page cache; warm: all in one process "
            "that keeps its experts.",
        ),
    ] = True,
    seed: Annotated[int, typer.Option(min=0, help="Decides the input's tokens.")] = 0,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            show_default="none",
            help="Run in a control group with so much memory, page cache included.",
        ),
    ] = None,
    baseline: Annotated[
        BaselineChoice | None,
        typer.Option(show_default="none", help="Run plain transformers with accelerate in turn with it."),
    ] = None,
    baseline_timeout: Annotated[float, typer.Option(min=1, help="Seconds for each process of the baseline.")] = 1800,
    style: Annotated[
        BenchFormat, typer.Option("--format", help="table, md: to read; json, jsonl, csv: to process.")
    ] = BenchFormat.TABLE,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default="none", help="Write a file too: .json, .jsonl, .csv or .md."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default="none", help="Show ratios to earlier records, .json or .jsonl."),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            show_default="none",
            help="Skip the cells that have a record there, and add each new one as soon as it is there.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default="none", help="Draw .png or .svg; needs the plot extra."),
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", show_default="none", help="Write a page; needs the plot extra."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes on stderr.")] = False,
) -> None:
    """Measure how fast a model runs here: every combination of the lists is a cell, in processes of its own."""
    from switchrun.bench.cells import Cell, product
    from switchrun.planning.budgets import parse_gpu_memory

    _check_model(model, synthetic, materialize)
    dtypes = options.dtype_list(dtype)
    memories = (
        [None]
        if cpu_memory is None
        else [_size("--cpu-memory", word) for word in options.words("--cpu-memory", cpu_memory)]
    )
    batches = [_batch(word) for word in options.words("--batch-size", batch_size)]
    if gpu_memory is not None:
        parse_gpu_memory(gpu_memory)
    first = Cell(
        model,
        gpu_memory=gpu_memory,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        repeats=repeats,
        warmup=warmup,
        cache="cold" if cold else "warm",
        seed=seed,
        memory_limit_bytes=None if memory_limit is None else _size("--memory-limit", memory_limit),
        baseline=None if baseline is None else "accelerate",
    )
    output = BenchOutput(style, Exports(export, plot, page), compare, resume)
    tell: Any = (lambda _: None) if quiet else report
    cells = product(first, dtypes, memories, batches)
    raise typer.Exit(
        bench_cells(
            cells,
            output,
            Path(offload_folder) if offload_folder else None,
            synthetic,
            materialize,
            baseline_timeout,
            tell,
        )
    )


def _check_model(model: str | None, synthetic: str | None, materialize: str | None) -> None:
    if model is not None and synthetic is not None:
        raise UsageError("--model and --synthetic cannot be used together", "leave one of them out")
    if materialize is not None and synthetic is None:
        raise UsageError("--materialize does nothing without --synthetic", "add --synthetic NAME")


def _size(option: str, word: str) -> int:
    from switchrun.units import parse_bytes

    try:
        return parse_bytes(word)
    except UsageError as error:
        raise UsageError(f"{option}: {error.message}", error.hint) from None


def _batch(word: str) -> int:
    if not word.isdigit() or int(word) == 0:
        raise UsageError(f"--batch-size: '{word}' is not a number above 0", "write it like 1 or 1,8")
    return int(word)
