"""`switchrun eval`: what each precision costs and saves on a text, in one table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from switchrun.checkpoint.types import HubWay
from switchrun.cli import options
from switchrun.cli.answering import EXIT_SOME_FAILED
from switchrun.cli.downloads import notes_of, open_for_processes
from switchrun.cli.help import Panel
from switchrun.cli.streams import Entry, LineReader, report, stdin_lines, write_answer
from switchrun.errors import InputError, UsageError
from switchrun.output.measurement_tables import EvalFormat, format_evaluation
from switchrun.output.progress import MeasurementProgress


def evaluate(
    text: Annotated[str, typer.Option("--text", metavar="FILE", help="What to score: one passage a line; - is stdin.")],
    model: options.Model = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            envvar="SWITCHRUN_DTYPE",
            show_default="auto,int8,nf4, or auto alone",
            help="What to compare, like fp32,bf16,int8,nf4. auto alone, if experts are stored in few bits.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            show_default="the first",
            rich_help_panel=Panel.MEASUREMENT,
            help="Which of them the others are held against.",
        ),
    ] = None,
    reference_model: Annotated[
        str | None,
        typer.Option(
            parser=options.or_demo_folder(options.model_name("reference-model")),
            autocompletion=options.complete_model,
            metavar="MODEL",
            show_default=False,
            rich_help_panel=Panel.MEASUREMENT,
            help="Hold them against another model, such as the original of one that QMoE compressed.",
        ),
    ] = None,
    cpu_memory: options.CpuMemory = None,
    offload_folder: options.OffloadFolder = None,
    offload_limit: options.OffloadLimit = None,
    hub: options.Hub = HubWay.AUTO,
    tokenizer: options.Tokenizer = None,
    seed: Annotated[
        int,
        typer.Option(metavar="N", min=0, rich_help_panel=Panel.MEASUREMENT, help="Decides which spans are taken out."),
    ] = 0,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default="all",
            rich_help_panel=Panel.INPUT,
            help="Take only the first N lines.",
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size",
            envvar="SWITCHRUN_BATCH_SIZE",
            metavar="N",
            min=1,
            rich_help_panel=Panel.MEMORY,
            help="Passages that attend, and generate, together. For the loss an expert is read once whatever it is.",
        ),
    ] = 8,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens",
            envvar="SWITCHRUN_MAX_NEW_TOKENS",
            metavar="N",
            min=0,
            help="Most tokens to generate for a passage; 0 leaves the generation out.",
        ),
    ] = 32,
    style: Annotated[EvalFormat, typer.Option("--format", help="table, md: to read; json: to process.")] = (
        EvalFormat.TABLE
    ),
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", rich_help_panel=Panel.OUTPUT, help="No notes on stderr.")
    ] = False,
) -> None:
    """Compare precisions on a text: loss, agreement, speed, memory.

    Examples:
        switchrun eval --text passages.txt --dtype bf16,int8,nf4
        switchrun eval --text passages.txt -m google/switch-base-8 --limit 50
        switchrun eval --text passages.txt --max-new-tokens 0 --format md
    """
    from switchrun.bench.child_process import as_error
    from switchrun.bench.evaluation import DEFAULT_DTYPES, Evaluation
    from switchrun.checkpoint.locate import hub_id
    from switchrun.machine import folders
    from switchrun.model.tokenizer_files import locate_tokenizer
    from switchrun.planning.budgets import parse_size
    from switchrun.planning.options import OpenOptions

    dtypes = None if dtype is None else options.dtype_list(dtype)
    if reference is not None:
        if reference_model is not None:
            raise UsageError("--reference and --reference-model exclude one another", "leave one of them out")
        reference = options.dtype_list(reference, "--reference")[0]
        if reference not in (dtypes or DEFAULT_DTYPES):
            hint = "add it there, or leave --reference out"
            raise UsageError(f"--reference: '{reference}' is not one of --dtype", hint)
    cpu_bytes = None if cpu_memory is None else parse_size("cpu_memory", cpu_memory)
    if offload_limit is not None:
        parse_size("offload_limit", offload_limit)
    name = "stdin" if text == "-" else text
    lines = _readable(name, islice(_entries(text), limit))
    progress = MeasurementProgress(sys.stderr, wanted=not quiet)
    tell = notes_of(progress, quiet)
    folder = folders.offload_folder(offload_folder)
    for each in dict.fromkeys((model, reference_model or model)):
        locate_tokenizer(each, tokenizer)
        if hub_id(each) is not None:
            open_for_processes(OpenOptions(model=each, offload_folder=folder, hub=hub.value), quiet=quiet)
    evaluation = Evaluation(
        model=model,
        reference_model=reference_model,
        text=name,
        lines=lines,
        cpu_memory=cpu_bytes,
        offload_folder=str(folder),
        offload_limit=offload_limit,
        hub=hub.value,
        tokenizer=tokenizer,
        seed=seed,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    try:
        record = evaluation.run(dtypes, reference, tell, progress.watch)
    finally:
        progress.clear()
    _tell_notes(record, tell)
    failed = [row for row in record["rows"] if row["status"] == "failed"]
    for row in failed:
        report(f"{row['name']}: {as_error(row['error'])}")
    write_answer(format_evaluation(record, style))
    if failed:
        raise typer.Exit(EXIT_SOME_FAILED)


def _entries(text: str) -> Iterable[Entry]:
    """Yield the lines of the text.

    Raises:
        UsageError: There is no such file.
    """
    if text == "-":
        yield from stdin_lines()
        return
    try:
        with Path(text).open("rb") as file:
            yield from LineReader(file)
    except OSError as error:
        raise UsageError(f"--text: '{text}' cannot be read: {error.strerror}", "give a file, or - for stdin") from error


def _readable(name: str, entries: Iterable[Entry]) -> list[str]:
    """Return the lines; a loss over those that happen to be readable would not be that of the text.

    Raises:
        InputError: A line is not text, or there is none.
    """
    lines = []
    for entry in entries:
        if entry.error is not None:
            raise InputError(f"{name}, line {entry.id + 1}: {entry.error.message}", entry.error.hint)
        lines.append(entry.text)
    if not lines:
        raise InputError(f"{name} has no lines", "put one passage on each line")
    return lines


def _tell_notes(record: dict[str, Any], tell: Callable[[str], Any]) -> None:
    text = record["text"]
    if text["skipped"]:
        tell(f"note: lines skipped, for they are too short for a span: {text['skipped']}")
    if text["cut"]:
        tell(f"note: lines cut at the longest input that the model takes: {text['cut']}")
    for row in record["rows"]:
        if row["status"] == "ok" and row["dtype"] != row["compute_dtype"]:
            loads = row["loss_pass"]["expert_loads"]
            # A stored one takes no more than a slot: more was read of the checkpoint, to be packed.
            if row["loss_pass"]["load_bytes"] > loads * row["slot_bytes"]:
                tell(
                    f"note: {row['name']}: experts were read from the checkpoint and packed; the next run reads them "
                    "packed, in fewer bytes and less time"
                )
