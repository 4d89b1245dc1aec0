"""Where a checkpoint is, which tensors it holds and at which byte offsets. No torch, no models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from switchrun.checkpoint.steps import NO_STEPS, Steps
from switchrun.checkpoint.types import HubWay

if TYPE_CHECKING:
    from switchrun.checkpoint.remote import HubRanges
    from switchrun.checkpoint.types import SwitchCheckpoint


def open_checkpoint(
    model: str | None = None,
    *,
    cache_dir: Path | None = None,
    download: bool = True,
    way: HubWay = HubWay.AUTO,
    ranges: HubRanges | None = None,
    steps: Steps = NO_STEPS,
) -> SwitchCheckpoint:
    """Find a Switch checkpoint and read its headers; no weights are read.

    Args:
        model: A folder, a Hub id with an optional `@revision`, or None for the demo model.
        cache_dir: Where parsed indexes are kept; by default `index` in the user's cache folder for switchrun.
        download: Whether the Hub may be asked; if not, what is on this machine must do.
        way: Whether a model of the Hub is downloaded. One that is on this machine already is used in each way.
        ranges: What reads from the Hub; it is closed only if this fails. Without it there is one for this call.
        steps: Takes what is being done.

    Raises:
        ModelError: Nothing is there, or it is no Switch model, or one of an unsupported kind.
        CorruptCheckpointError: A file is damaged, or does not hold what it should.
        NetworkError: The Hub could not be reached.
        UsageError: A revision was given for a local folder.
    """
    # Imported here, so that whoever needs only `checkpoint.types` pays for no more.
    from switchrun.checkpoint.dialect import understand
    from switchrun.checkpoint.index import NotKeptError, load_index
    from switchrun.checkpoint.locate import NotDownloadedError, asking, locate

    with asking(model if download else None, ranges) as asked:
        location = locate(model, cache_dir=cache_dir, way=way, ranges=asked, steps=steps)
        try:
            index = load_index(location.path, cache_dir, location.remote, asked, steps)
        except NotKeptError as error:
            if download:
                raise
            raise NotDownloadedError(location.id) from error
    return understand(location, index)
