"""`switchrun fill`: fills the sentinels of texts, given as arguments or as lines on stdin."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchrun._plan import prepare
from switchrun.cli import options
from switchrun.cli.fill_run import FillRequest, FillRun
from switchrun.cli.libraries import quieten_libraries
from switchrun.cli.streams import Entry, read_arguments, report, report_lines, stdin_lines
from switchrun.dtypes import DtypeChoice
from switchrun.errors import UsageError
from switchrun.model.records import GenerationOptions
from switchrun.model.sentinels import replace_blanks
from switchrun.output.progress import SessionProgress
from switchrun.output.sinks import FillFormat

if TYPE_CHECKING:
    from switchrun.model.session import Session

_DEFAULTS = GenerationOptions()
_SAMPLING = "Only with --sample."


def fill(
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT",
            show_default=False,
            help="A text with sentinels, quoted for the shell: 'A <extra_id_0> walks into a bar.' "
            "No TEXT, or -, reads one input a line from stdin.",
        ),
    ] = None,
    model: options.Model = None,
    dtype: options.Dtype = DtypeChoice.AUTO,
    cpu_memory: options.CpuMemory = None,
    gpu_memory: options.GpuMemory = None,
    offload_folder: options.OffloadFolder = None,
    offload_limit: options.OffloadLimit = None,
    device_map: options.DeviceMap = "auto",
    tokenizer: options.Tokenizer = None,
    batch_size: options.BatchSize = 1,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", envvar="SWITCHRUN_MAX_NEW_TOKENS", min=1, help="Most tokens to generate for an input."
        ),
    ] = _DEFAULTS.max_new_tokens,
    num_beams: options.NumBeams = _DEFAULTS.num_beams,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[
        float | None,
        typer.Option(show_default=str(_DEFAULTS.temperature), help=f"Divides the logits before drawing. {_SAMPLING}"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            show_default=str(_DEFAULTS.top_p),
            help=f"Draw from the likeliest tokens that together have this probability. {_SAMPLING}",
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            min=0,
            show_default=str(_DEFAULTS.top_k),
            help=f"Draw from this many likeliest tokens; 0 is all. {_SAMPLING}",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=2**63 - 1, show_default=str(_DEFAULTS.seed), help=f"The same seed draws the same. {_SAMPLING}"
        ),
    ] = None,
    style: Annotated[
        FillFormat,
        typer.Option(
            "--format",
            envvar="SWITCHRUN_FORMAT",
            help="text: the sentence filled in; raw: the model's own output; json, jsonl: a record of each input.",
        ),
    ] = FillFormat.TEXT,
    blank: Annotated[
        str | None,
        typer.Option(metavar="MARK", show_default=False, help="Take this mark, like ___, for the next sentinel."),
    ] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Tell memory and speed on stderr at the end.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress on stderr.")] = False,
) -> None:
    """Fill in the sentinels of each TEXT: <extra_id_0>, <extra_id_1> and so on."""
    options.check_memory(cpu_memory, gpu_memory)
    options.check_offload_limit(offload_limit)
    map_path = options.device_map_path(
        device_map, model=model, dtype=None if dtype is DtypeChoice.AUTO else dtype, offload_folder=offload_folder
    )
    if blank is not None:
        replace_blanks("", blank)  # refuses a mark that cannot stand for a blank
    generation = _generation_options(max_new_tokens, num_beams, sample, temperature, top_p, top_k, seed)
    arguments = _arguments(texts or [])
    label = "line" if not arguments else "text" if len(arguments) > 1 else None
    progress = SessionProgress(sys.stderr, wanted=not quiet)
    run = FillRun(FillRequest(generation, batch_size, style, blank, label), progress.clear)

    entries: Iterable[Entry]
    if arguments:
        entries = list(run.check(read_arguments(arguments)))
        if all(entry.error for entry in entries):
            run.fill_none(entries)
            raise typer.Exit(run.exit_code)
    else:
        entries = run.check(stdin_lines())

    quieten_libraries()
    try:
        with open_session(
            model,
            dtype=dtype.value,
            cpu_memory=cpu_memory,
            gpu_memory=gpu_memory,
            offload_folder=offload_folder,
            offload_limit=offload_limit,
            device_map=map_path,
            tokenizer=tokenizer,
            batch_size=batch_size,
            num_beams=num_beams,
            output_tokens=max_new_tokens,
            progress=progress,
            warn=partial(_warn, None if quiet else progress),
        ) as session:
            progress.clear()
            if not quiet:
                _tell_notes(
                    (*session.checkpoint.repairs, *session.plan.notes),
                    from_terminal=not arguments and sys.stdin.isatty(),
                )
            run.fill(session, entries)
            if stats:
                from switchrun.output.tables import render_stats

                progress.clear()
                report_lines(render_stats(session.stats()))
    finally:
        progress.clear()
    raise typer.Exit(run.exit_code)


def open_session(model: str | None, **settings: Any) -> Session:
    """Open the model; only here is torch imported. The tests put a session of their own in the place of this."""
    from switchrun import hardware

    started = time.perf_counter() - hardware.process_age_seconds()
    own = {name: settings.pop(name) for name in ("tokenizer", "progress", "warn")}
    # A wrong model or budget is told before torch is imported, which takes seconds.
    prepared = prepare(model, **settings)
    from switchrun.model.imports import import_libraries
    from switchrun.model.preload import DensePreload

    with DensePreload(prepared) as preload:
        import_libraries(prepared.plan)
        from switchrun.model.session import Session

        return Session(prepared, started=started, preload=preload, **own)


def _arguments(texts: list[str]) -> list[str]:
    if "-" not in texts:
        return texts
    if len(texts) > 1:
        raise UsageError("- reads the inputs from stdin, so there can be no TEXT beside it")
    return []


def _generation_options(
    max_new_tokens: int,
    num_beams: int,
    sample: bool,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
) -> GenerationOptions:
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    given: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    if given and not sample:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} does nothing without --sample", "add --sample")
    if temperature is not None and not 0 < temperature < math.inf:
        raise UsageError(
            f"--temperature must be above 0, not {temperature:g}", "1 leaves the probabilities as they are"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"--top-p must be above 0 and at most 1, not {top_p:g}", "1 draws from all tokens")
    return GenerationOptions(max_new_tokens=max_new_tokens, num_beams=num_beams, sample=sample, **given)


def _warn(progress: SessionProgress | None, warning: str) -> None:
    """Tell a warning, from any thread; nothing if there is no progress line, which is so if quiet is asked for."""
    if progress is not None:
        progress.clear()
        report(f"warning: {warning}")


def _tell_notes(notes: Iterable[str], *, from_terminal: bool) -> None:
    for note in notes:
        report(f"note: {note}")
    if from_terminal:
        report("type one input a line; Ctrl-D ends")
