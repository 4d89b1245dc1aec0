"""Models that are downloaded whole before they are opened: a question first if there is a terminal, then progress."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from switchrun.checkpoint.types import HubWay
from switchrun.cli.streams import confirmed, warn
from switchrun.errors import SwitchrunError, UsageError
from switchrun.output.progress import ByteProgress
from switchrun.units import format_bytes

if TYPE_CHECKING:
    from switchrun.checkpoint.types import SwitchCheckpoint
    from switchrun.planning.options import OpenOptions

#: More is not downloaded without a question.
_MUCH_BYTES = 10_000_000_000


def ask_to_download(model: str | None, way: HubWay) -> None:
    """Ask before much is downloaded, on a terminal; a script is not asked.

    Raises:
        UsageError: The answer is no.
    """
    from switchrun.checkpoint.locate import hub_id

    found = hub_id(model)
    if way is not HubWay.DOWNLOAD or found is None or not _is_terminal():
        return
    from switchrun.checkpoint.hub_ways import missing_bytes
    from switchrun.checkpoint.remote import HubRanges

    size = 0
    with contextlib.suppress(SwitchrunError), HubRanges() as ranges:  # whoever opens the model says what is wrong
        size = missing_bytes(*found, ranges, way)
    if size > _MUCH_BYTES and not confirmed(f"Download {format_bytes(size)} of {found[0]}? [y/N] "):
        raise UsageError("nothing was downloaded", "--hub ranges reads what is needed, and no more")


@contextlib.contextmanager
def download_progress(*, wanted: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback that shows how far a download is, on a line that is erased at the end."""
    progress = ByteProgress(sys.stderr, "download", wanted=wanted)
    try:
        yield progress
    finally:
        progress.clear()


def open_for_processes(opening: OpenOptions, *, quiet: bool) -> SwitchCheckpoint:
    """Open a model that other processes will open, which have no terminal: what they would download is here then."""
    from switchrun.planning.opening import open_model

    ask_to_download(None if opening.model is None else str(opening.model), HubWay(opening.hub))
    with download_progress(wanted=not quiet) as on_download:
        checkpoint, ranges = open_model(opening, (lambda _: None) if quiet else warn, on_download)
    if ranges is not None:
        ranges.close()
    return checkpoint


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
