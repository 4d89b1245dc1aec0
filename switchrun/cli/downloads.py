"""What is shown while a model is opened, and the question before one is downloaded whole, if there is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from switchrun.checkpoint.types import HubWay
from switchrun.cli.streams import confirmed, report, someone_types
from switchrun.errors import SwitchrunError, UsageError
from switchrun.model.reporting import Reporter
from switchrun.output.progress import SessionProgress
from switchrun.units import format_bytes

if TYPE_CHECKING:
    from switchrun.checkpoint.steps import Steps
    from switchrun.checkpoint.types import SwitchCheckpoint
    from switchrun.output.progress import Line
    from switchrun.planning.options import OpenOptions

#: More is not downloaded without a question.
_MUCH_BYTES = 10_000_000_000


def notes_of(progress: Line, quiet: bool) -> Callable[[str], None]:
    """Return what reports a line for a human, where the line of progress is; from any thread."""

    def note(text: str) -> None:
        if not quiet:
            with progress.hidden():
                report(text)

    return note


def ask_to_download(opening: OpenOptions, progress: Line) -> None:
    """Ask before much is downloaded, on a terminal; a script is not asked.

    Raises:
        UsageError: The answer is no.
    """
    from switchrun.checkpoint.locate import hub_id

    way = HubWay(opening.hub)
    found = hub_id(None if opening.model is None else str(opening.model))
    if way is not HubWay.DOWNLOAD or found is None or not someone_types():
        return
    from switchrun.checkpoint.hub_ways import missing_bytes
    from switchrun.checkpoint.remote import HubRanges

    size = 0
    with contextlib.suppress(SwitchrunError), HubRanges() as ranges:  # whoever opens the model says what is wrong
        size = missing_bytes(*found, ranges, way)
    if size > _MUCH_BYTES:
        with progress.hidden():
            if not confirmed(f"Download {format_bytes(size)} of {found[0]}? [y/N] "):
                raise UsageError("nothing was downloaded", "--hub ranges reads what is needed, and no more")


@contextlib.contextmanager
def shown_opening(
    opening: OpenOptions, *, quiet: bool, asks: bool = True
) -> Iterator[tuple[Steps, Callable[[str], None]]]:
    """Show how far the opening of a model is, for as long as the block runs; asks before much is downloaded.

    Yields what takes the steps, and what takes warnings.
    """
    model = None if opening.model is None else str(opening.model)
    progress = SessionProgress(sys.stderr, model, wanted=not quiet)
    note = notes_of(progress, quiet)
    progress.opening()
    try:
        if asks:
            ask_to_download(opening, progress)
        steps = Reporter(progress)
        with steps.working():
            yield steps, lambda warning: note(f"warning: {warning}")
    finally:
        progress.clear()


def open_for_processes(opening: OpenOptions, *, quiet: bool) -> SwitchCheckpoint:
    """Open a model that other processes will open, which have no terminal: what they would download is here then."""
    from switchrun.planning.opening import open_model

    with shown_opening(opening, quiet=quiet) as (steps, warn):
        checkpoint, ranges = open_model(opening, warn, steps)
    if ranges is not None:
        ranges.close()
    return checkpoint
