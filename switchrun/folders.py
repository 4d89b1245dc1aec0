"""Where switchrun may write: the offload folder, and the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Give the folder for what switchrun may remember: `SWITCHRUN_CACHE`, else the user's cache folder."""
    override = os.environ.get("SWITCHRUN_CACHE")
    if override:
        return Path(override)
    import platformdirs  # not needed by `switchrun --help`

    return platformdirs.user_cache_path("switchrun")


def offload_folder(given: str | Path | None) -> Path:
    """Give the folder for the disk tier that switchrun writes, and for parsed indexes.

    Args:
        given: The user's choice; without one it is `offload/` in the current folder where there is one, else a folder
            in the user's cache.
    """
    if given is not None:
        return Path(given)
    here = Path("offload")
    return here if here.is_dir() else cache_folder() / "offload"
