"""`switchrun map`: answers a file of inputs, which may take hours, into another file; goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from switchrun.checkpoint.types import HubWay
from switchrun.cli import options
from switchrun.cli.answering import EXIT_SOME_FAILED, Work, open_with_notes
from switchrun.cli.downloads import notes_of
from switchrun.cli.fill import fill_work
from switchrun.cli.generate import generate_work
from switchrun.cli.help import Panel
from switchrun.cli.input_files import DEFAULT_FIELD, InputFile, InputFormat, open_inputs
from switchrun.cli.journal import Journal, Key, open_journal
from switchrun.cli.signals import SIGNALS, Interrupted
from switchrun.cli.streams import Entry, report, report_lines
from switchrun.dtypes import DtypeChoice
from switchrun.errors import InputError, UsageError
from switchrun.model.records import SCHEMA_VERSION, GenerationOptions
from switchrun.output.answer_files import answer_file, cannot_write, check_output
from switchrun.output.progress import ByteProgress, InputProgress
from switchrun.output.sinks import FillFormat, format_failure, format_record
from switchrun.units import MIB, format_count, format_seconds

if TYPE_CHECKING:
    from switchrun.model.records import GenerateResult
    from switchrun.model.session import Session
    from switchrun.planning.options import OpenOptions

_DEFAULTS = GenerationOptions()
_OWN = "; generate: the model's"
#: So much of the file goes to the session at a time, which divides it into batches.
_WINDOW_INPUTS = 1024
_WINDOW_CHARACTERS = MIB


class MapTask(StrEnum):
    """What `switchrun map --task` takes."""

    FILL = "fill"
    GENERATE = "generate"


def map_inputs(
    inputs: Annotated[
        str,
        typer.Argument(
            metavar="IN", show_default=False, help="A file of inputs: .jsonl, .csv, .parquet, or one input a line."
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            parser=options.named("output"),
            show_default=False,
            help="Where the answers go, in the order of the inputs: .jsonl (fill's records), .csv, .parquet, or lines.",
        ),
    ],
    input_format: Annotated[
        InputFormat | None,
        typer.Option("--input-format", show_default="by IN's ending", rich_help_panel=Panel.INPUT, help="What IN is."),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            "--field",
            metavar="NAME",
            show_default=DEFAULT_FIELD,
            rich_help_panel=Panel.INPUT,
            help="The key or column of IN that holds the text.",
        ),
    ] = None,
    task: Annotated[MapTask, typer.Option(help="What to do with each input.")] = MapTask.FILL,
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
    batch_size: Annotated[
        str,
        typer.Option(
            envvar="SWITCHRUN_BATCH_SIZE",
            metavar="auto|N",
            rich_help_panel=Panel.MEMORY,
            help="Inputs answered together; an expert they share is read once. auto: as many as fit.",
        ),
    ] = "auto",
    max_new_tokens: Annotated[int | None, options.max_new_tokens(f"{_DEFAULTS.max_new_tokens}{_OWN}")] = None,
    num_beams: Annotated[int | None, options.num_beams(f"{_DEFAULTS.num_beams}{_OWN}")] = None,
    sample: Annotated[bool | None, options.sample_or_not(f"no{_OWN}")] = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    seed: options.Seed = None,
    blank: options.Blank = None,
    prefix: Annotated[
        str,
        typer.Option(
            metavar="TEXT",
            show_default=False,
            rich_help_panel=Panel.INPUT,
            help="Put this before each text. Only with --task generate.",
        ),
    ] = "",
    force: Annotated[
        bool,
        typer.Option("--force", rich_help_panel=Panel.OUTPUT, help="Write OUT even if there is a file of that name."),
    ] = False,
    restart: Annotated[
        bool,
        typer.Option("--restart", rich_help_panel=Panel.OUTPUT, help="Begin again, whatever an earlier run answered."),
    ] = False,
    stats: options.Stats = False,
    quiet: options.Quiet = False,
) -> None:
    """Answer each input of the file IN, and write the answers to OUT.

    It may be stopped at any time, and killed: the same command goes on from there. Until OUT is complete, what was
    answered is in OUT.journal. Inputs that fail are in OUT.errors.jsonl, with their reasons.

    Examples:
        switchrun map sentences.txt -o answers.jsonl --cpu-memory 4GiB
        switchrun map in.csv --field question -o out.csv --blank ___
        switchrun map dialogues.jsonl -o out.jsonl --task generate -m my-summarizer
    """
    from switchrun.planning.options import OpenOptions

    started = time.perf_counter()
    if task is MapTask.FILL:
        max_new_tokens, num_beams = max_new_tokens or _DEFAULTS.max_new_tokens, num_beams or _DEFAULTS.num_beams
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
        batch_size=options.batch_size(batch_size),
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
    )
    drawing = options.drawing(sample, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    asked = drawing | {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    given = {name: value for name, value in asked.items() if value is not None}
    if task is MapTask.FILL:
        if prefix:
            raise UsageError("--prefix does nothing without --task generate", "add --task generate")
        generation = GenerationOptions(**given)
        work: Work[Any, Any, Any] = fill_work(generation, blank)
        given = asdict(generation)
    else:
        if blank is not None:
            raise UsageError("--blank does nothing with --task generate", "leave it out")
        work = generate_work(given, prefix)

    out = _Output(Path(output))
    out.check(Path(inputs), force)
    reading = ByteProgress(sys.stderr, "read", wanted=not quiet)
    try:
        source = open_inputs(Path(inputs), input_format, text_field, reading)
    finally:
        reading.clear()
    key = _key_of_inputs(source) | {"--task": task.value, "--blank": blank, "--prefix": prefix}
    key |= {f"--{name.replace('_', '-')}": value for name, value in given.items()}
    with open_journal(out.journal, source.count, restart=restart) as journal:
        if not (journal.begun or force):
            out.check_new()
        journal.check_key(key)
        run = _Run(source, journal, work, opening, quiet=quiet)
        try:
            with open_with_notes(opening, run.progress, run.note) as session:
                run.begin(session, key)
                run.answer(session)
                if stats:
                    from switchrun.output.tables import render_stats

                    run.progress.clear()
                    report_lines(render_stats(session.stats()))
            out.write(journal)
        except Interrupted:
            run.progress.clear()
            if journal.key is not None and not quiet:
                again = "the same command without --restart" if restart else "the same command"
                report(f"stopped: {run.so_far()}; {again} goes on from there")
            raise
        finally:
            run.progress.clear()
        journal.remove()
    failed = f"; {journal.failed:,} failed, for the reasons in {out.errors}" if journal.failed else ""
    if failed or not quiet:
        answered, seconds = source.count - journal.failed, format_seconds(time.perf_counter() - started)
        report(f"{answered:,} of {source.count:,} inputs answered in {out.path}, {seconds}{failed}")
    if journal.failed:
        raise typer.Exit(EXIT_SOME_FAILED if journal.failed < source.count else InputError.exit_code)


@dataclass(frozen=True, slots=True)
class _Output:
    """OUT, and the files beside it."""

    path: Path
    journal: Path = field(init=False)
    errors: Path = field(init=False)

    def __post_init__(self) -> None:
        for attribute, ending in (("journal", ".journal"), ("errors", ".errors.jsonl")):
            object.__setattr__(self, attribute, Path(f"{self.path}{ending}"))

    def check(self, inputs: Path, force: bool) -> None:
        """Refuse what cannot become a file, what needs a package that is not there, and to write over other files."""
        if not self.path.name or str(self.path) == "-" or os.path.isdir(self.path):  # noqa: PTH112 - it never raises
            raise UsageError(f"--output: '{self.path}' is no name for a file", "name one, for example out.jsonl")
        if not os.path.isdir(self.path.parent):  # noqa: PTH112
            raise UsageError(f"--output: there is no folder '{self.path.parent}'", "make it first")
        for path in (self.path, self.journal, self.errors):
            with suppress(OSError):
                if path.samefile(inputs):
                    raise UsageError(f"--output: {path} is IN itself", "name another file")
        if os.path.exists(self.path) and not os.path.isfile(self.path):  # noqa: PTH110, PTH113
            raise UsageError(f"--output: {self.path} is no file", "name one; for a pipe there is: switchrun fill")
        if not force and not os.path.lexists(self.journal):
            self.check_new()
        check_output(self.path)

    def check_new(self) -> None:
        """Refuse to write over a file."""
        if os.path.lexists(self.path):
            raise UsageError(f"{self.path} is there already", "name another OUT, or write over it with --force")

    def write(self, journal: Journal) -> None:
        """Write the answers and, if any failed, those that did; an earlier run's errors go away."""
        if journal.failed:
            with answer_file(self.path) as answer, answer_file(self.errors) as fail:
                for record in journal.records():
                    answer(record)
                    if "error" in record:
                        fail(record)
            return
        with answer_file(self.path) as answer:
            for record in journal.records():
                answer(record)
        try:
            self.errors.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.errors, error) from error


class _Run:
    """Answers the inputs that are not in the journal."""

    def __init__(
        self,
        source: InputFile,
        journal: Journal,
        work: Work[Any, Any, Any],
        opening: OpenOptions,
        *,
        quiet: bool,
    ) -> None:
        self._source = source
        self._journal = journal
        self._work = work
        self._tokenizer = opening.tokenizer
        model = None if opening.model is None else str(opening.model)
        self.progress = InputProgress(sys.stderr, model, source.count, journal.answered, wanted=not quiet)
        self.note = notes_of(self.progress, quiet)

    def begin(self, session: Session, key: Key) -> None:
        """Begin the journal, or go on with it if it belongs to this model."""
        key = {**key, **_key_of_model(session, self._tokenizer)}
        journal = self._journal
        if journal.key is None:
            with SIGNALS.held():
                journal.begin(key)
            return
        journal.check_key(key)
        if journal.damaged:
            self.note(f"warning: {journal.path}: {format_count(journal.damaged, 'line')} damaged, answered again")
        if journal.answered:
            self.note(f"note: resuming: {self.so_far()}")

    def so_far(self) -> str:
        return f"{self._journal.answered:,} of {self._source.count:,} inputs are answered"

    def answer(self, session: Session) -> None:
        """Answer all that is left, and keep it as it comes."""
        for window in _windows(entry for entry in self._source.entries() if entry.id not in self._journal):
            failed: list[Entry] = []
            ids: list[int] = []
            texts: list[Any] = []
            for entry in window:
                try:
                    if entry.error is not None:
                        raise entry.error
                    entry = replace(entry, text=self._work.check(entry.text))
                    texts.append(self._work.encode(session, entry.text))
                    ids.append(entry.id)
                except InputError as error:
                    failed.append(replace(entry, error=error))
            if failed:
                self._keep([(each.id, _failure(each), True) for each in failed])
            if texts:
                self._work.answer(session, texts, ids, self._keep_results)
        self._journal.sync()

    def _keep_results(self, results: Sequence[GenerateResult]) -> None:
        self._keep([(each.id, format_record(each.as_record(), indent=False), False) for each in results])

    def _keep(self, records: Sequence[tuple[int, str, bool]]) -> None:
        self._source.check_unchanged()
        with SIGNALS.held():
            self._journal.append(records)
        self.progress.answered(self._journal.answered)


def _windows(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    window: list[Entry] = []
    characters = 0
    for entry in entries:
        window.append(entry)
        characters += len(entry.text)
        if len(window) == _WINDOW_INPUTS or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _failure(entry: Entry) -> str:
    assert entry.error is not None
    return format_failure(entry.id, entry.text, entry.error, FillFormat.JSONL)


def _key_of_inputs(source: InputFile) -> dict[str, Any]:
    return {
        "what is in IN": f"{source.size} {source.sha256}",
        "--input-format": source.format.value,
        "--field": source.field,
    }


def _key_of_model(session: Session, tokenizer: str | None) -> dict[str, Any]:
    """What of the model changes an answer: its weights, settings and tokenizer, and what it computes in."""
    from switchrun.checkpoint.locate import locate_settings
    from switchrun.model.tokenizer_files import tokenizer_content

    checkpoint = session.checkpoint
    folder = checkpoint.path if tokenizer is None else locate_settings(tokenizer)
    settings = json.dumps([checkpoint.config, checkpoint.generation], sort_keys=True, default=str)
    return {
        "the format of records": SCHEMA_VERSION,
        "the content of the model": checkpoint.fingerprint,
        "the revision of the model": checkpoint.revision,
        "the configuration of the model": hashlib.sha256(settings.encode()).hexdigest(),
        "the tokenizer": tokenizer_content(folder),
        "--dtype": session.plan.dtype,
    }
