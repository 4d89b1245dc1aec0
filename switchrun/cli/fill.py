"""`switchrun fill`: fills the sentinels of texts, given as arguments or as lines on stdin."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchrun.cli import options
from switchrun.cli.startup import import_libraries, quieten_libraries
from switchrun.cli.streams import Entry, read_arguments, report, report_lines, stdin_lines, write_answer
from switchrun.dtypes import DtypeChoice
from switchrun.errors import InputError, UsageError
from switchrun.machine import processor
from switchrun.model.records import FillResult, GenerationOptions
from switchrun.model.sentinels import check_sentinels, replace_blanks
from switchrun.output.progress import SessionProgress
from switchrun.output.sinks import FillFormat, format_failure, format_result
from switchrun.planning.options import OpenOptions

if TYPE_CHECKING:
    from switchrun.model.session import Session
    from switchrun.model.tokenizer import Encoded


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
    opening = OpenOptions(
        model=model,
        dtype=dtype.value,
        cpu_memory=cpu_memory,
        gpu_memory=gpu_memory,
        offload_folder=offload_folder,
        offload_limit=offload_limit,
        device_map=device_map,
        tokenizer=tokenizer,
        batch_size=batch_size,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
    )
    if blank is not None:
        replace_blanks("", blank)  # refuses a mark that cannot stand for a blank
    generation = _generation_options(max_new_tokens, num_beams, sample, temperature, top_p, top_k, seed)
    arguments = _arguments(texts or [])
    label = "line" if not arguments else "text" if len(arguments) > 1 else None
    progress = SessionProgress(sys.stderr, wanted=not quiet)
    answers = _Answers(style, progress.clear, several=label is not None)
    run = FillRun(FillRequest(generation, batch_size, blank, label), answers)

    entries: Iterable[Entry]
    entries = list(run.check(read_arguments(arguments))) if arguments else run.check(stdin_lines())
    quieten_libraries()
    with answers:
        if isinstance(entries, list) and all(entry.error for entry in entries):
            run.fill_none(entries)
            raise typer.Exit(run.exit_code)
        try:
            with open_session(opening, progress, partial(_warn, None if quiet else progress)) as session:
                progress.clear()
                if not quiet:
                    _show_notes(
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


def open_session(opening: OpenOptions, progress: SessionProgress, warn: Callable[[str], None]) -> Session:
    """Open the model. The tests put a session of their own in the place of this."""
    from switchrun.model.session import open_session as open_it

    started = time.perf_counter() - processor.process_age_seconds()
    return open_it(opening, progress=progress, warn=warn, started=started, import_libraries=import_libraries)


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
    return GenerationOptions(max_new_tokens=max_new_tokens, num_beams=num_beams, sample=sample, **given)


def _warn(progress: SessionProgress | None, warning: str) -> None:
    """Show a warning, from any thread; nothing if there is no progress line, which is so if quiet is asked for."""
    if progress is not None:
        progress.clear()
        report(f"warning: {warning}")


def _show_notes(notes: Iterable[str], *, from_terminal: bool) -> None:
    for note in notes:
        report(f"note: {note}")
    if from_terminal:
        report("type one input a line; Ctrl-D ends")


EXIT_SOME_FAILED = 3

#: So many unreadable entries may wait for a batch to be full: each may be as long as a line can be.
_MOST_UNREADABLE = 8


@dataclass(frozen=True, slots=True)
class FillRequest:
    """What `fill` does with its inputs.

    Attributes:
        options: How to generate.
        batch_size: Inputs filled together.
        blank: What the texts have in the place of a sentinel; None if they have sentinels.
        label: What an input is called in messages (`line`, `text`); None if there is only one.
    """

    options: GenerationOptions
    batch_size: int
    blank: str | None
    label: str | None


class FillRun:
    """Fills inputs in order and counts what came of them.

    Args:
        request: What to do.
        answers: Writes what comes of it.
    """

    def __init__(self, request: FillRequest, answers: _Answers) -> None:
        self._request = request
        self._answers = answers
        self.answered = 0
        self.failed = 0

    @property
    def exit_code(self) -> int:
        """0 if all inputs were answered, 3 if some were not, 4 if none was."""
        if not self.failed:
            return 0
        return EXIT_SOME_FAILED if self.answered else InputError.exit_code

    def check(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Put sentinels in the place of blanks, and mark the entries whose sentinels are wrong; needs no model."""
        for entry in entries:
            if entry.error is None:
                try:
                    if self._request.blank is not None:
                        entry = replace(entry, text=replace_blanks(entry.text, self._request.blank))
                    check_sentinels(entry.text)
                except InputError as error:
                    entry = replace(entry, error=error)
            yield entry

    def fill_none(self, entries: Iterable[Entry]) -> None:
        """Answer entries all of which have an error."""
        for entry in entries:
            if entry.error is not None:
                self._write_failure(entry, entry.error)

    def fill(self, session: Session, entries: Iterable[Entry]) -> None:
        """Fill checked entries, a batch at a time; each batch's answers are written before the next is read.

        Args:
            session: The open model.
            entries: Checked entries; reading the next may block, as a person types.

        Raises:
            SwitchrunError: The model failed, not an input; nothing more can be answered.
        """
        waiting: list[_Ready] = []
        readable = 0
        for entry in entries:
            ready = _encode(session, entry)
            waiting.append(ready)
            readable += not isinstance(ready.text, InputError)
            # An unreadable entry is answered at once, unless answers of earlier entries must come first.
            if readable in (0, self._request.batch_size) or len(waiting) == self._request.batch_size + _MOST_UNREADABLE:
                self._answer(session, waiting)
                waiting, readable = [], 0
        self._answer(session, waiting)

    def _answer(self, session: Session, waiting: Sequence[_Ready]) -> None:
        texts = [ready.text for ready in waiting if not isinstance(ready.text, InputError)]
        results = iter(session.fill(texts, self._request.options, first_id=waiting[0].entry.id) if texts else ())
        for ready in waiting:
            if isinstance(ready.text, InputError):
                self._write_failure(ready.entry, ready.text)
            else:
                self._answers.write_result(replace(next(results), id=ready.entry.id))
                self.answered += 1

    def _write_failure(self, entry: Entry, error: InputError) -> None:
        self.failed += 1
        label = self._request.label
        self._answers.report(f"{label} {entry.id + 1}: {error}" if label else str(error))
        if label is not None:
            self._answers.write_failure(entry, error)


@dataclass(frozen=True, slots=True)
class _Ready:
    """An entry, and what the model gets of it; the error if it cannot be filled."""

    entry: Entry
    text: Encoded | InputError


def _encode(session: Session, entry: Entry) -> _Ready:
    if entry.error is not None:
        return _Ready(entry, entry.error)
    try:
        return _Ready(entry, session.encode(entry.text))
    except InputError as error:
        return _Ready(entry, error)


class _Answers:
    """Writes answers to stdout in one format; in `json` all of them are one document, an array if there are several.

    A context manager, whose end ends the document, also after an error or a signal.

    Args:
        style: The format.
        clear_progress: Called before anything is written, so that the progress line never mixes with it.
        several: Whether there may be several inputs.
    """

    def __init__(self, style: FillFormat, clear_progress: Callable[[], None], several: bool) -> None:
        self._style = style
        self._several = several
        self._clear_progress = clear_progress
        self._count = 0
        #: The first record, until it is known whether there is another.
        self._first = ""

    def report(self, message: str) -> None:
        self._clear_progress()
        report(message)

    def write_result(self, result: FillResult) -> None:
        self._write(format_result(result, self._style))

    def write_failure(self, entry: Entry, error: InputError) -> None:
        self._write(format_failure(entry.id, entry.text, error, self._style))

    def _write(self, lines: str) -> None:
        self._clear_progress()
        self._count += 1
        if self._style is not FillFormat.JSON:
            write_answer(lines)
        elif self._count == 1:
            self._first = lines
        else:
            begin = f"[\n{self._first.rstrip()}" if self._count == 2 else ""
            write_answer(f"{begin},\n{lines.rstrip()}")

    def __enter__(self) -> _Answers:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._style is not FillFormat.JSON:
            return
        if self._count:
            write_answer(self._first if self._count == 1 else "\n]\n")
        elif self._several and error is None:
            write_answer("[]\n")
