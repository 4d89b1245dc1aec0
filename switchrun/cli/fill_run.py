"""The run behind `switchrun fill`: inputs in, batches through the session, answers out, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from switchrun.cli.streams import Entry, report, write_answer
from switchrun.errors import InputError
from switchrun.model.records import FillResult, GenerationOptions
from switchrun.model.sentinels import check_sentinels, replace_blanks
from switchrun.output.sinks import FillFormat, format_failure, format_result

if TYPE_CHECKING:
    from switchrun.model.session import Session

EXIT_SOME_FAILED = 3

#: So many unreadable entries may wait for a batch to be full: each may be as long as a line can be.
_MOST_UNREADABLE = 8


@dataclass(frozen=True, slots=True)
class FillRequest:
    """What `fill` does with its inputs.

    Attributes:
        options: How to generate.
        batch_size: Inputs filled together.
        style: Format of the answers.
        blank: What the texts have in the place of a sentinel; None if they have sentinels.
        label: What an input is called in messages (`line`, `text`); None if there is only one.
    """

    options: GenerationOptions
    batch_size: int
    style: FillFormat
    blank: str | None
    label: str | None


class FillRun:
    """Fills inputs in order and counts what came of them.

    Args:
        request: What to do.
        clear_progress: Called before anything is written, so that the progress line never mixes with it.
    """

    def __init__(self, request: FillRequest, clear_progress: Callable[[], None]) -> None:
        self._request = request
        self._clear_progress = clear_progress
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
        waiting: list[Entry] = []
        readable = 0
        for entry in entries:
            entry = _check_length(session, entry)
            waiting.append(entry)
            readable += entry.error is None
            # An unreadable entry is answered at once, unless answers of earlier entries must come first.
            if readable in (0, self._request.batch_size) or len(waiting) == self._request.batch_size + _MOST_UNREADABLE:
                self._answer(session, waiting)
                waiting, readable = [], 0
        self._answer(session, waiting)

    def _write_failure(self, entry: Entry, error: InputError) -> None:
        self._clear_progress()
        self.failed += 1
        label = self._request.label
        if label is None:
            report(str(error))
        else:
            report(f"{label} {entry.id + 1}: {error}")
            write_answer(format_failure(entry.id, entry.text, error, self._request.style))

    def _answer(self, session: Session, entries: Sequence[Entry]) -> None:
        texts = [entry.text for entry in entries if entry.error is None]
        results = iter(session.fill(texts, self._request.options, first_id=entries[0].id) if texts else ())
        for entry in entries:
            if entry.error is not None:
                self._write_failure(entry, entry.error)
            else:
                self._write_result(replace(next(results), id=entry.id))

    def _write_result(self, result: FillResult) -> None:
        self._clear_progress()
        write_answer(format_result(result, self._request.style))
        self.answered += 1


def _check_length(session: Session, entry: Entry) -> Entry:
    if entry.error is None:
        try:
            session.check(entry.text)
        except InputError as error:
            return replace(entry, error=error)
    return entry
