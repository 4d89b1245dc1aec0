"""`switchrun fill`: fills the sentinels of texts, given as arguments or as lines on stdin."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchrun.checkpoint.types import HubWay
from switchrun.cli import options
from switchrun.cli.downloads import ask_to_download
from switchrun.cli.signals import SIGNALS
from switchrun.cli.startup import import_libraries, quieten_libraries
from switchrun.cli.streams import Entry, read_arguments, report, report_lines, stdin_lines, write_answer
from switchrun.dtypes import DtypeChoice
from switchrun.errors import InputError, UsageError
from switchrun.machine import processor
from switchrun.model.records import FillResult, GenerationOptions, Progress, ProgressCallback
from switchrun.model.sentinels import check_sentinels, replace_blanks
from switchrun.output.progress import SessionProgress
from switchrun.output.sinks import FillFormat, format_failure, format_result
from switchrun.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from switchrun.model.session import Session
    from switchrun.model.tokenizer import Encoded
    from switchrun.planning.options import OpenOptions
    from switchrun.planning.plan import HubCost, Plan

EXIT_SOME_FAILED = 3

#: If more is expected from the Hub, the user hears of it before it begins.
_MUCH_BYTES = 1_000_000_000
#: So many unreadable entries may wait for a batch to be full: each may be as long as a line can be.
_MOST_UNREADABLE = 8

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
    hub: options.Hub = HubWay.AUTO,
    network_bandwidth: options.NetworkBandwidth = None,
    batch_size: options.BatchSize = 1,
    max_new_tokens: Annotated[
        int,
        typer.Option(envvar="SWITCHRUN_MAX_NEW_TOKENS", min=1, help="Most tokens to generate for an input."),
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
    stats: Annotated[bool, typer.Option("--stats", help="Show memory and speed on stderr at the end.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress on stderr.")] = False,
) -> None:
    """Fill in the sentinels of each TEXT: <extra_id_0>, <extra_id_1> and so on."""
    from switchrun.planning.options import OpenOptions

    opening = OpenOptions(
        model=model,
        dtype=dtype.value,
        cpu_memory=cpu_memory,
        gpu_memory=gpu_memory,
        offload_folder=offload_folder,
        offload_limit=offload_limit,
        device_map=device_map,
        tokenizer=tokenizer,
        hub=hub.value,
        network_bandwidth=network_bandwidth,
        batch_size=batch_size,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
    )
    if blank is not None:
        replace_blanks("", blank)  # refuses a mark that cannot stand for a blank
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
    given: dict[str, Any] = {name: value for name, value in sampling.items() if value is not None}
    if given and not sample:
        raise UsageError(f"--{next(iter(given)).replace('_', '-')} does nothing without --sample", "add --sample")
    generation = GenerationOptions(max_new_tokens=max_new_tokens, num_beams=num_beams, sample=sample, **given)

    arguments = [] if texts == ["-"] else texts or []
    if "-" in arguments:
        raise UsageError("- reads the inputs from stdin, so there can be no TEXT beside it")
    entries: Iterable[Entry] = _check(read_arguments(arguments) if arguments else stdin_lines(), blank)
    hopeless = False
    if arguments:
        entries = list(entries)
        hopeless = all(entry.error for entry in entries)
    progress = SessionProgress(sys.stderr, wanted=not quiet)

    def note(text: str) -> None:
        if not quiet:
            progress.clear()
            report(text)

    def show(step: Progress) -> None:
        if threading.current_thread() is threading.main_thread():  # not in a download
            SIGNALS.check()  # at each layer and token, for a signal that some library swallowed
        progress(step)

    def announce(plan: Plan) -> None:
        if plan.hub is not None:
            progress.expected_hub_bytes = plan.hub.index_bytes + plan.hub.fetch_bytes
            if plan.hub.fetch_bytes > _MUCH_BYTES:
                note(_hub_costs(plan.model_id, plan.hub))

    quieten_libraries()
    label = "line" if not arguments else "text" if len(arguments) > 1 else None
    with _Answers(style, label, progress.clear) as answers:
        if hopeless:
            answers.write(entries, ())
            raise typer.Exit(answers.exit_code)
        ask_to_download(model, hub)
        with open_session(opening, show, lambda warning: note(f"warning: {warning}"), announce) as session:
            progress.clear()
            for sentence in (*session.checkpoint.repairs, *session.plan.notes):
                note(f"note: {sentence}")
            if not arguments and sys.stdin.isatty():
                note("type one input a line; Ctrl-D ends")
            _fill(session, entries, generation, batch_size, answers)
            if stats:
                from switchrun.output.tables import render_stats

                progress.clear()
                report_lines(render_stats(session.stats()))
    raise typer.Exit(answers.exit_code)


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


def _check(entries: Iterable[Entry], blank: str | None) -> Iterator[Entry]:
    """Put sentinels in the place of blanks, and mark the entries whose sentinels are wrong; needs no model."""
    for entry in entries:
        if entry.error is None:
            try:
                if blank is not None:
                    entry = replace(entry, text=replace_blanks(entry.text, blank))
                check_sentinels(entry.text)
            except InputError as error:
                entry = replace(entry, error=error)
        yield entry


def _fill(
    session: Session, entries: Iterable[Entry], options: GenerationOptions, batch_size: int, answers: _Answers
) -> None:
    """Fill checked entries, a batch at a time; each batch's answers are written before the next entry is read."""
    waiting: list[Entry] = []
    texts: list[Encoded] = []

    def answer() -> None:
        answers.write(waiting, session.fill(texts, options, first_id=waiting[0].id) if texts else ())
        waiting.clear()
        texts.clear()

    for entry in entries:
        if entry.error is None:
            try:
                texts.append(session.encode(entry.text))
            except InputError as error:
                entry = replace(entry, error=error)
        waiting.append(entry)
        # An unreadable entry is answered at once, unless answers of earlier entries must come first.
        if len(texts) in (0, batch_size) or len(waiting) == batch_size + _MOST_UNREADABLE:
            answer()
    answer()


class _Answers:
    """Writes to stdout what comes of each input, in one format, and counts it.

    In `json` all answers are one document, an array if there are several. Leaving the context ends a document that was
    begun, also after an error or a signal. `label` is what an input is called in messages (`line`); None if only one
    is possible. `clear_progress` is called before anything is written.
    """

    def __init__(self, style: FillFormat, label: str | None, clear_progress: Callable[[], None]) -> None:
        self._style = style
        self._label = label
        self._clear_progress = clear_progress
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

    def write(self, entries: Iterable[Entry], results: Iterable[FillResult]) -> None:
        """Write entries in their order, with the results of those that have no error."""
        of_readable = iter(results)
        for entry in entries:
            if entry.error is None:
                self._answered += 1
                self._write(format_result(replace(next(of_readable), id=entry.id), self._style))
                continue
            self._failed += 1
            self._clear_progress()
            report(f"{self._label} {entry.id + 1}: {entry.error}" if self._label else str(entry.error))
            if self._label:
                self._write(format_failure(entry.id, entry.text, entry.error, self._style))

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
