"""Which models the Hub's local cache holds, by its folders alone: no network, no weights, no library that scans it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from switchrun.checkpoint.dialect import is_switch_config
from switchrun.checkpoint.hub import cache_folder
from switchrun.checkpoint.index import CONFIG
from switchrun.checkpoint.locate import hub_id
from switchrun.machine.files import read_regular

_PREFIX = "models--"
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model of the cache that is a Switch model by its configuration; `name` opens just this commit of it."""

    id: str
    commit: str
    name: str
    folder: Path


def cached_models() -> list[CachedModel]:
    """Return the Switch models of the cache, of each the commit of `main` if it is there; what is odd is left out."""
    root = cache_folder()
    return [] if root is None else list(_models(root))


def bytes_of(model: CachedModel) -> int:
    """Return what the files of a model take in the cache, those of all its commits."""
    total = 0
    with contextlib.suppress(OSError):
        for path in (model.folder / "blobs").iterdir():
            with contextlib.suppress(OSError):
                total += path.lstat().st_size
    return total


def _models(root: Path) -> Iterator[CachedModel]:
    for name in _names(root):
        id = name.removeprefix(_PREFIX).replace("--", "/")  # noqa: A001 - as the Hub calls it
        if not name.startswith(_PREFIX) or hub_id(id) is None:
            continue
        folder = root / name
        main = _main(folder)
        for commit in filter(None, (main, *_names(folder / "snapshots"))):
            if _COMMIT.fullmatch(commit) and is_switch_config(folder / "snapshots" / commit / CONFIG):
                yield CachedModel(id, commit, id if commit == main else f"{id}@{commit}", folder)
                break


def _main(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return read_regular(folder / "refs" / "main", 100).decode("ascii", "replace").strip()
    return ""


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return sorted(path.name for path in folder.iterdir())
    return []
