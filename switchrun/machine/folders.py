"""Where switchrun may write: the offload folder, and the user's cache folder."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from pathlib import Path

_MODEL = re.compile(r"(?:[A-Za-z0-9._-]+-)?[0-9a-f]{12}", re.ASCII)
DTYPE_NAME = re.compile(r"[a-z0-9]+", re.ASCII)
#: A parsed index of a checkpoint.
_INDEX = re.compile(r"[0-9a-f]{32}\.json", re.ASCII)
#: The cache folder of who has no home: nobody can ever make it, so nothing is found there and nothing kept.
NOWHERE = Path(os.devnull) / "no-home-folder"


def cache_folder() -> Path:
    """Return the folder for what switchrun may remember: `SWITCHRUN_CACHE`, else `switchrun` in the user's cache."""
    override = os.environ.get("SWITCHRUN_CACHE")
    if override:
        return Path(override)
    for folder in (Path(os.environ.get("XDG_CACHE_HOME", "")), in_home("~/.cache")):
        if folder.is_absolute():  # by XDG's rules a relative one counts as unset
            return folder / "switchrun"
    return NOWHERE


def in_home(path: str | Path) -> Path:
    """Return a path with the home folder in the place of `~`; unchanged if there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def write_cache_file(file: Path, data: bytes) -> None:
    """Write a file that may be lost, whole or not at all; a cache that cannot be written is no reason to fail."""
    # A name of its own: two processes may write the same file at once.
    temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()


def offload_folder(given: str | Path | None) -> Path:
    """Return the folder for the disk tier that switchrun writes, and for parsed indexes.

    Unless one is given, it is `offload/` in the current folder, if that is there and switchrun's own or empty; else it
    is a folder in the user's cache.
    """
    if given is not None:
        return Path(given)
    here = Path("offload")
    return here if _is_ours(here) else cache_folder() / "offload"


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty, or what is in it shows that switchrun writes there."""
    try:
        names = {path.name for path in folder.iterdir()}
        if not names:
            return True
        readme = folder / "README.md"
        if "README.md" in names and "switchrun" in readme.read_text(encoding="utf-8", errors="replace"):
            return True
        manifests = folder.glob("*/*/manifest.json")
        indexes = (folder / "index").glob("*.json")
        return any(is_store_folder(file.parent) for file in manifests) or any(_INDEX.fullmatch(i.name) for i in indexes)
    except OSError:  # it is not there, no folder, or may not be looked at
        return False


def is_store_folder(folder: Path) -> bool:
    """Whether a folder's name is one that experts of a model and dtype are kept under.

    Others have files called manifest.json too, and an offload folder may be any folder of the user's.
    """
    return bool(_MODEL.fullmatch(folder.parent.name) and DTYPE_NAME.fullmatch(folder.name))
