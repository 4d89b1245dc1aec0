"""Where a checkpoint is, which tensors it holds and at which byte offsets. No torch, no models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from switchrun.checkpoint.types import HubWay

if TYPE_CHECKING:
    from switchrun.checkpoint.remote import HubRanges
    from switchrun.checkpoint.types import SwitchCheckpoint


def open_checkpoint(
    model: str | None = None,
    *,
    cache_dir: Path | None = None,
    download: bool = True,
    way: HubWay = HubWay.AUTO,  # noqa: ARG001
    ranges: HubRanges | None = None,  # noqa: ARG001
) -> SwitchCheckpoint:
    """Find a Switch checkpoint and read its headers; no weights are read.

    Args:
        model: A folder, a Hub id with an optional `@revision`, or None for the demo model.
        cache_dir: Where parsed indexes are kept; by default `index` in the user's cache folder for switchrun.
        download: Whether a model may be downloaded from the Hub.
        way: How a model of the Hub is opened.
        ranges: What reads from the Hub.

    Raises:
        ModelError: Nothing is there, or it is no Switch model, or one of an unsupported kind.
        CorruptCheckpointError: A file is damaged, or does not hold what it should.
        NetworkError: The Hub could not be reached.
        UsageError: A revision was given for a local folder.
    """
    # Imported here, so that whoever needs only `checkpoint.types` pays for no more.
    from switchrun.checkpoint.dialect import understand
    from switchrun.checkpoint.index import load_index
    from switchrun.checkpoint.locate import locate

    location = locate(model, download=download)
    return understand(location, load_index(location.path, cache_dir))
