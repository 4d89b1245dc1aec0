"""From what the user typed to a folder: a path, a Hub id, or the demo model."""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path

from switchrun.checkpoint.files import open_weights
from switchrun.errors import CorruptCheckpointError, ModelError, UsageError
from switchrun.machine.folders import in_home

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
#: This much of both ends of the demo's weights differs from those of a demo that was trained again.
_SAMPLE_BYTES = 64 * 1024
_WAYS = "give a folder that holds config.json, or a Hub id such as google/switch-base-8"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a checkpoint lies; its id is what the user called it, its revision the Hub's commit.

    `content` is what identifies the files' content, whatever their times; empty if nothing but those does.
    """

    id: str
    revision: str | None
    path: Path
    content: str = ""


class NotDownloadedError(ModelError):
    """A model of the Hub that was not to be downloaded, and is not in the local cache."""


def locate(model: str | None, *, download: bool = True, weights: bool = True) -> Location:
    """Find the folder of a checkpoint, downloading it if need be; arguments and errors are those of `open_checkpoint`.

    A folder that exists wins over a model of that id on the Hub, which is not asked at all unless `download` is true.
    Without `weights` only what else there is of it is downloaded.
    """
    if model is None:
        if not (demo_folder() / "config.json").is_file():
            raise ModelError("the demo model is not part of this installation", _WAYS)
        return Location(id="demo", revision=None, path=demo_folder(), content=_demo_content())
    path = in_home(model)
    if _is_dir(path):
        path = path.resolve()
        content = _demo_content() if path == demo_folder() else ""
        return Location(id=model, revision=None, path=path, content=content)
    if _exists(path):
        raise ModelError(f"{model} is a file, not a model's folder", f"give its folder: {path.parent}")
    name, at, revision = model.partition("@")
    if at and _is_dir(in_home(name)):
        raise UsageError(f"{name} is a local folder, which has no revisions", f"leave out @{revision}")
    found = hub_id(model)
    if found is None:
        raise ModelError(f"there is no folder {model!r}, and it is not a Hub id", _WAYS)
    from switchrun.checkpoint.hub import cached_snapshot, find_snapshot

    snapshot = find_snapshot(*found, weights) if download else cached_snapshot(*found)
    if snapshot is None:
        raise NotDownloadedError(f"{model} is not in the Hub's local cache", f"download it: hf download {name}")
    return Location(id=name, revision=snapshot.name, path=snapshot, content=snapshot.name)


def hub_id(model: str | None) -> tuple[str, str | None] | None:
    """Return a Hub id and its revision; None for the demo, a folder or file that is there, or what is no id."""
    if model is None or _exists(in_home(model)):
        return None
    name, at, revision = model.partition("@")
    return (name, revision or None) if _HUB_ID.fullmatch(name) and bool(at) == bool(revision) else None


def demo_folder() -> Path:
    """Return the folder of the demo model inside the package."""
    return Path(str(importlib.resources.files("switchrun") / "demo"))


def _demo_content() -> str:
    try:
        with open_weights(demo_folder() / "model.safetensors") as file:
            length = min(_SAMPLE_BYTES, file.size)
            return hashlib.sha256(file.read(0, length) + file.read(file.size - length, length)).hexdigest()
    except CorruptCheckpointError:
        return ""  # Opening it will say what is wrong.


def _is_dir(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # A name that is too long, or holds a zero byte.
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # As above.
        return False
