"""From what the user typed to a `SwitchCheckpoint`: locate, index, understand."""

from __future__ import annotations

from pathlib import Path

from switchrun.checkpoint.dialect import understand
from switchrun.checkpoint.index import load_index
from switchrun.checkpoint.locate import locate
from switchrun.checkpoint.types import SwitchCheckpoint


def open_checkpoint(
    model: str | None = None, *, cache_dir: Path | None = None, download: bool = True
) -> SwitchCheckpoint:
    """Find a Switch checkpoint and read its headers; no weights are read.

    Args:
        model: A folder, a Hub id with an optional `@revision`, or None for the demo model inside the package.
        cache_dir: Where parsed indexes are kept. The default is `index` in `SWITCHRUN_CACHE`, or in the user's cache
            folder for switchrun.
        download: Whether a model that is on the Hub only may be downloaded; else it is not there (ModelError).

    Returns:
        The checkpoint, with its configuration repaired.

    Raises:
        ModelError: Nothing is there, or it is no Switch model, or one of an unsupported kind.
        CorruptCheckpointError: A file is damaged, or does not hold what it should.
        NetworkError: The Hub could not be reached.
        UsageError: A revision was given for a local folder.
    """
    location = locate(model, download=download)
    return understand(location, load_index(location.path, cache_dir))
