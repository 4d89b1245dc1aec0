"""What commands have in common that answer texts, given as arguments or as lines on stdin: `fill` and its like.

Answers come in the order of the texts, on stdout; whatever else there is to say goes to stderr.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import typer

from switchrun.cli.downloads import ask_to_download, notes_of
from switchrun.cli.signals import SIGNALS
from switchrun.cli.startup import import_libraries, quieten_libraries
from switchrun.cli.streams import (
    Entry,
    TypedLines,
    read_arguments,
    report,
    report_lines,
    someone_types,
    stdin_lines,
    write_answer,
)
from switchrun.errors import InputError, UsageError
from switchrun.machine import processor
from switchrun.model.records import GenerateResult
from switchrun.output.progress import SessionProgress
from switchrun.output.sinks import FillFormat, format_failure, format_result
from switchrun.output.terminal import takes_colours
from switchrun.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from switchrun.client import Client
    from switchrun.model.records import Progress, ProgressCallback, ScoreResult
    from switchrun.model.session import Session
    from switchrun.planning.options import OpenOptions
    from switchrun.planning.plan import HubCost, Plan

EXIT_SOME_FAILED = 3

_PROMPT = "> "

#: If more is expected from the Hub, the user hears of it before it begins.
_MUCH_BYTES = 1_000_000_000
#: So many texts, or together about so many characters, are answered at most before their answers are written: some
#: batches, so that those of like length are found together, and no more, so that memory is bounded.
_WINDOW_TEXTS = 512
_WINDOW_CHARACTERS = 1024**2

_Checked = TypeVar("_Checked")
_Encoded = TypeVar("_Encoded")
_Result = TypeVar("_Result", bound="GenerateResult | ScoreResult")
#: Called with the results of a batch as soon as they are there.
OnResults = Callable[[Sequence[_Result]], None]


@dataclass(frozen=True, slots=True)
class Work(Generic[_Checked, _Encoded, _Result]):
    """What a command does with a text; each raises InputError for a text that it cannot do it with.

    Attributes:
        check: Returns what to go on with, whose `str` is the text that records show; needs no model.
        encode: Makes it ready for the session, which comes first.
        answer: Answers texts that were made ready, in their order; their ids are given, and what to call with the
            results of each batch.
        ask: Has a server answer what `check` returned; an InputError stands in the place of a result.
        remark: Returns what a person should know of some answers, if anything; it is noted once.
        typed: What a person who is asked for a line should type.
    """

    check: Callable[[str], _Checked]
    encode: Callable[[Any, _Checked], _Encoded]
    answer: Callable[[Any, Sequence[_Encoded], Sequence[int], OnResults[_Result]], Sequence[_Result]]
    ask: Callable[[Client, Sequence[_Checked], Sequence[int]], Sequence[_Result | InputError]]
    remark: Callable[[Sequence[_Result]], str | None] = lambda _results: None
    typed: str = "one input a line"


def answer_texts(
    work: Work[_Checked, _Encoded, _Result],
    texts: Sequence[str] | None,
    opening: OpenOptions | Client,
    *,
    style: FillFormat,
    stats: bool,
    quiet: bool,
    lines: int = 1,
) -> NoReturn:
    """Answer the TEXT arguments, or the lines of stdin if there is none; ends the command with its exit code.

    In `text` and `raw` every input has so many lines.
    """
    from switchrun.planning.options import OpenOptions

    arguments = [] if texts == ["-"] else list(texts or ())
    if "-" in arguments:
        raise UsageError("- reads the inputs from stdin, so there can be no TEXT beside it")
    typed = not arguments and someone_types()
    stdin = None if arguments else TypedLines("" if quiet else _PROMPT) if typed else stdin_lines()
    entries: Iterable[Entry] = _check(work, read_arguments(arguments) if stdin is None else stdin)
    hopeless = False
    if arguments:
        entries = list(entries)
        hopeless = all(entry.error for entry in entries)
    label = "line" if not arguments else "text" if len(arguments) > 1 else None
    model = opening.model if isinstance(opening, OpenOptions) else opening.url
    progress = SessionProgress(sys.stderr, None if model is None else str(model), label, wanted=not quiet)
    note = notes_of(progress, quiet)
    with _Answers(style, label, progress.clear, lines) as answers:
        if hopeless:
            answers.write(entries, ())
            raise typer.Exit(answers.exit_code)
        if isinstance(opening, OpenOptions):
            opened: AbstractContextManager[Any] = open_with_notes(opening, progress, note)
            size, doing = opening.batch_size, work
        else:
            opened, size, doing = _ready(opening, note), "auto", _asked(work)
        with opened as session:
            if typed:
                note(f"type {work.typed}; Ctrl-D ends")
            most = _WINDOW_TEXTS if size == "auto" else size
            ready = stdin.ready if size == "auto" and stdin is not None else lambda: True
            _answer(doing, session, entries, most, ready, answers, note)
            if stats:
                from switchrun.output.tables import render_stats

                progress.clear()
                report_lines(render_stats(session.stats()))
    raise typer.Exit(answers.exit_code)


@contextmanager
def _ready(client: Client, note: Callable[[str], None]) -> Iterator[Client]:
    """Wait until the server has opened its model."""
    with client:
        client.wait_until_ready(lambda: note(f"{client.url} is still opening its model"))
        yield client


def _asked(work: Work[Any, Any, Any]) -> Work[Any, Any, Any]:
    """Return the work with a `Client` in the place of the session."""
    return replace(
        work,
        encode=lambda _client, checked: checked,
        answer=lambda client, checked, ids, _on_results: work.ask(client, checked, ids),
    )


@contextmanager
def open_with_notes(opening: OpenOptions, progress: SessionProgress, note: Callable[[str], None]) -> Iterator[Session]:
    """Open the model, and report what is to know of it; asks before much is downloaded."""

    def show(step: Progress) -> None:
        if threading.current_thread() is threading.main_thread():
            SIGNALS.check()  # at each layer and token, for a signal that some library swallowed
        progress(step)

    def announce(plan: Plan) -> None:
        if plan.hub is not None:
            progress.expected_hub_bytes = plan.hub.index_bytes + plan.hub.fetch_bytes
            if plan.hub.fetch_bytes > _MUCH_BYTES:
                note(_hub_costs(plan.model_id, plan.hub))

    progress.opening()
    quieten_libraries()
    ask_to_download(opening, progress)
    with open_session(opening, show, lambda warning: note(f"warning: {warning}"), announce) as session:
        progress.clear()
        for sentence in (*session.checkpoint.repairs, *session.plan.notes):
            note(f"note: {sentence}")
        yield session


def open_session(
    opening: OpenOptions,
    progress: ProgressCallback,
    warn: Callable[[str], None],
    on_plan: Callable[[Plan], None],
) -> Session:
    """Open the model. The tests put a session of their own in the place of this."""
    from switchrun.model.session import open_session as open_it

    started = time.perf_counter() - processor.process_age_seconds()
    return open_it(
        opening, progress=progress, warn=warn, started=started, import_libraries=import_libraries, on_plan=on_plan
    )


def _hub_costs(model: str, cost: HubCost) -> str:
    """Write what a fill is expected to bring from the Hub."""
    time, rate = format_seconds(cost.seconds), format_rate(cost.bandwidth_bytes_per_second)
    source = "" if cost.bandwidth_source == "measured" else f" ({cost.bandwidth_source})"
    fetched = format_bytes(cost.fetch_bytes)
    return f"{model}: about {fetched} from the Hub, {time} at {rate}{source}; kept in {cost.folder}"


def _check(work: Work[_Checked, _Encoded, _Result], entries: Iterable[Entry]) -> Iterator[Entry]:
    """Mark the entries whose texts are wrong."""
    for entry in entries:
        if entry.error is None:
            try:
                checked = work.check(entry.text)
                entry = replace(entry, text=str(checked), checked=checked)
            except InputError as error:
                entry = replace(entry, error=error)
        yield entry


def _answer(
    work: Work[_Checked, _Encoded, _Result],
    session: Session | Client,
    entries: Iterable[Entry],
    most: int,
    ready: Callable[[], bool],
    answers: _Answers,
    note: Callable[[str], None],
) -> None:
    """Answer checked entries, at most so many at a time, and no more than are `ready`; then write their answers."""
    waiting: list[Entry] = []
    texts: list[_Encoded] = []
    characters = 0
    remark: str | None = None

    def answer() -> None:
        nonlocal characters, remark
        ids = [entry.id for entry in waiting if entry.error is None]
        results = work.answer(session, texts, ids, lambda _results: None) if texts else ()
        answers.write(waiting, results)
        answered = [result for result in results if not isinstance(result, InputError)]
        if answered and remark is None and (remark := work.remark(answered)):
            note(f"note: {remark}")
        waiting.clear()
        texts.clear()
        characters = 0

    for entry in entries:
        if entry.error is None:
            try:
                texts.append(work.encode(session, entry.checked))
            except InputError as error:
                entry = replace(entry, error=error)
        waiting.append(entry)
        characters += len(entry.text)
        # An unreadable entry is answered at once, unless answers of earlier entries must come first.
        full = len(texts) in (0, most) or len(waiting) == most + _WINDOW_TEXTS
        if full or characters >= _WINDOW_CHARACTERS or not ready():
            answer()
    answer()


class _Answers:
    """Writes to stdout what comes of each input, in one format, and counts it.

    In `json` all answers are one document, an array if there are several. Leaving the context ends a document that was
    begun, also after an error or a signal. `label` is what an input is called in messages (`line`); None if only one
    is possible. `clear_progress` is called before anything is written; `lines` are those of an input.
    """

    def __init__(self, style: FillFormat, label: str | None, clear_progress: Callable[[], None], lines: int) -> None:
        self._style = style
        self._lines = lines
        self._label = label
        self._clear_progress = clear_progress
        self._colours = takes_colours(sys.__stdout__)
        self._answered = 0
        self._failed = 0
        self._written = 0
        #: The first record, until it is known whether there is another.
        self._first = ""

    @property
    def exit_code(self) -> int:
        """0 if all inputs were answered, 3 if some were not, 4 if none was."""
        if not self._failed:
            return 0
        return EXIT_SOME_FAILED if self._answered else InputError.exit_code

    def write(self, entries: Iterable[Entry], results: Iterable[GenerateResult | ScoreResult | InputError]) -> None:
        """Write entries in their order, with the results of those that have no error."""
        of_readable = iter(results)
        for entry in entries:
            result = next(of_readable) if entry.error is None else entry.error
            if not isinstance(result, InputError):
                self._answered += 1
                self._write(format_result(result, self._style, self._lines, colours=self._colours))
                self._explain(result)
                continue
            self._failed += 1
            self._clear_progress()
            report(f"{self._label} {entry.id + 1}: {result}" if self._label else str(result))
            if self._label:
                self._write(format_failure(entry.id, entry.text, result, self._style, self._lines))

    def _explain(self, result: GenerateResult | ScoreResult) -> None:
        """Show a person where the tokens of an answer went; records have it themselves."""
        routing = result.routing if isinstance(result, GenerateResult) else None
        if routing is not None and self._style in (FillFormat.TEXT, FillFormat.RAW):
            from switchrun.output.tables import render_routing

            report_lines(render_routing(routing, f"{self._label} {result.id + 1}" if self._label else "the text"))

    def _write(self, lines: str) -> None:
        self._clear_progress()
        self._written += 1
        if self._style is not FillFormat.JSON:
            write_answer(lines)
        elif self._written == 1:
            self._first = lines
        else:
            begin = f"[\n{self._first.rstrip()}" if self._written == 2 else ""
            write_answer(f"{begin},\n{lines.rstrip()}")

    def __enter__(self) -> _Answers:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._clear_progress()
        if self._style is not FillFormat.JSON:
            return
        if self._written:
            write_answer(self._first if self._written == 1 else "\n]\n")
        elif self._label and error is None:
            write_answer("[]\n")
