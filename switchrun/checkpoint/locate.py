"""From what the user typed to a folder: a path, a Hub id, or the demo model."""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from switchrun.checkpoint.files import open_weights
from switchrun.checkpoint.steps import NO_STEPS, Steps
from switchrun.checkpoint.types import HubWay, RemoteRepo
from switchrun.errors import CorruptCheckpointError, ModelError, UsageError
from switchrun.machine.folders import cache_folder, in_home

if TYPE_CHECKING:
    from switchrun.checkpoint.remote import HubRanges

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
#: A commit or a name of git: `main`, `refs/pr/1`. It becomes a path in the local cache.
_REVISION = re.compile(r"(?!/)(?!.*(?:\.\.|//|@\{))[^\s\0-\x1f\x7f~^:?*\[\\]+(?<!/)")
#: This much of both ends of the demo's weights differs from those of a demo that was trained again.
_SAMPLE_BYTES = 64 * 1024
_WAYS = "give a folder that holds config.json, or a Hub id such as google/switch-base-8"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a checkpoint lies; its id is what the user called it, its revision the Hub's commit.

    `content` is what identifies the files' content, whatever their times; empty if nothing but those does. With
    `remote` the weights are on the Hub, and the rest in `path`.
    """

    id: str
    revision: str | None
    path: Path
    content: str = ""
    remote: RemoteRepo | None = None


class NotDownloadedError(ModelError):
    """A model of the Hub, which was not to be asked, and what is on this machine does not suffice."""

    def __init__(self, repo: str) -> None:
        super().__init__(f"{repo} is not in the Hub's local cache", f"download it: hf download {repo}")


def locate(
    model: str | None,
    *,
    cache_dir: Path | None = None,
    way: HubWay = HubWay.AUTO,
    ranges: HubRanges | None = None,
    steps: Steps = NO_STEPS,
) -> Location:
    """Find a checkpoint, downloading what is missing of it; arguments and errors are those of `open_checkpoint`.

    A folder that exists wins over a model of that id on the Hub, which is not asked at all without `ranges`.
    """
    location = _locate_local(model)
    if location is not None:
        return location
    repo, revision = _require_id(model)
    from switchrun.checkpoint.hub_ways import find_kept, find_model

    listings = cache_dir or cache_folder() / "index"
    if ranges is not None:
        path, remote = find_model(repo, revision, ranges, way, listings, steps)
    elif found := find_kept(repo, revision, listings):
        path, remote = found
    else:
        raise NotDownloadedError(repo)
    return Location(id=repo, revision=path.name, path=path, content=path.name, remote=remote)


def locate_settings(model: str | None) -> Path:
    """Return the folder of a model's configuration and tokenizer, downloading those; errors are those of `locate`."""
    location = _locate_local(model)
    if location is not None:
        return location.path
    from switchrun.checkpoint.hub_ways import find_settings
    from switchrun.checkpoint.remote import HubRanges

    repo, revision = _require_id(model)
    with HubRanges() as ranges:
        return find_settings(repo, revision, ranges)


def asking(model: str | None, ranges: HubRanges | None) -> AbstractContextManager[HubRanges | None]:
    """What asks the Hub for a model: the caller's, which stays open, or one for this purpose; None for a local one."""
    if ranges is not None or hub_id(model) is None:
        return nullcontext(ranges)
    from switchrun.checkpoint.remote import HubRanges

    return HubRanges()


def _locate_local(model: str | None) -> Location | None:
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
    return None


def _require_id(model: str | None) -> tuple[str, str | None]:
    found = hub_id(model)
    if found is None:
        raise ModelError(f"there is no folder {model!r}, and it is not a Hub id", _WAYS)
    return found


def hub_id(model: str | None) -> tuple[str, str | None] | None:
    """Return a Hub id and its revision; None for the demo, a folder or file that is there, or what is no id."""
    if model is None or _exists(in_home(model)):
        return None
    name, at, revision = model.partition("@")
    good = _HUB_ID.fullmatch(name) and (_REVISION.fullmatch(revision) or not at)
    return (name, revision or None) if good else None


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
