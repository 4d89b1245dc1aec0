"""What a store's folders and files are called, what is found there, and how it is opened: never through a link."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

from switchrun.checkpoint.locate import demo_folder
from switchrun.checkpoint.types import ExpertKey, Stack, SwitchCheckpoint
from switchrun.errors import command
from switchrun.machine.files import open_regular
from switchrun.machine.folders import DTYPE_NAME, offload_folder, open_below

#: The folder of a model's dense weights, beside those of its experts, and the file in it.
DENSE_FOLDER, DENSE_FILE = "dense", "dense.safetensors"
_BLOCK = re.compile(r"(encoder|decoder)\.(0|[1-9][0-9]*)", re.ASCII)
_EXPERT = re.compile(r"(0|[1-9][0-9]*)\.safetensors", re.ASCII)


def model_name(checkpoint: SwitchCheckpoint) -> str:
    """Return a store's name of a model, the same from any folder: `id@revision`, the checkpoint's folder, or `demo`."""
    if checkpoint.revision is not None:
        return f"{checkpoint.id}@{checkpoint.revision}"
    # Not by its id: a folder of the user's may be called demo too.
    return "demo" if checkpoint.path == demo_folder() else str(checkpoint.path)


def store_folder(offload: str | Path, model: str, dtype: str) -> Path:
    """Return the folder of a model's experts in one dtype, `<offload>/<model>/<dtype>`; ValueError if that is no dtype.

    A model's name may be a path, absolute or with `..`. Its last words name the folder for people; a hash of all of it
    keeps models apart whose names end alike, or differ in letters that a folder's name cannot have.
    """
    if not DTYPE_NAME.fullmatch(dtype):
        raise ValueError(f"{dtype!r} is not a dtype's name")
    digest = hashlib.sha256(model.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2])[-64:].strip(".-")
    return Path(offload) / (f"{words}-{digest}" if words else digest) / dtype


def clear_hint(offload: str | Path, model: str, dtype: str) -> str:
    """Return the hint to run the command that empties a store."""
    named = None if Path(offload).absolute() == offload_folder(None).absolute() else offload
    return f"run `{command('offload', 'clear', model=model, dtype=dtype, offload_folder=named)}`"


def expert_path(folder: Path, key: ExpertKey) -> Path:
    """Return the file of one expert in a store's folder."""
    return folder / f"{key.stack}.{key.block}" / f"{key.expert}.safetensors"


def dense_path(offload: str | Path, model: str) -> Path:
    """Return the file of a model's dense weights, if they came from the Hub."""
    return store_folder(offload, model, DENSE_FOLDER) / DENSE_FILE


def opened(folder: Path, *below: str, make: bool = False) -> AbstractContextManager[int]:
    """Open a store's folder, or that of one of its layers, for calls with `dir_fd`, as `open_below` does."""
    return open_below(*_parts(folder, 2), *below, make=make)


def _parts(path: Path, depth: int) -> list[str]:
    """Return the offload folder, and the names below it that lead to a path at this depth."""
    # Not by pathlib, which would take longer than the system: each load comes by here.
    text = os.fspath(path)
    root, *names = (text if text.startswith("/") else f"./{text}").rsplit("/", depth)
    return [root or "/", *names]


def open_stored(path: Path, flags: int = 0) -> int:
    """Open an expert's file for reading, as `open_regular` does; nothing below the offload folder may be a link."""
    *folders, name = _parts(path, 4)
    with open_below(*folders) as block:
        return open_regular(name, flags | os.O_NOFOLLOW, dir_fd=block)


def stored_status(path: Path) -> os.stat_result | None:
    """Return the status of an expert's file that may be read; None if there is no such file."""
    *folders, name = _parts(path, 4)
    with contextlib.suppress(OSError), open_below(*folders) as block:
        status = os.stat(name, dir_fd=block, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode) and os.access(name, os.R_OK, dir_fd=block):
            return status
    return None


def stored_exists(path: Path) -> bool:
    """Whether anything has the name of an expert's file, be it a file or not."""
    *folders, name = _parts(path, 4)
    with contextlib.suppress(OSError), open_below(*folders) as block:
        os.stat(name, dir_fd=block, follow_symlinks=False)
        return True
    return False


def remove_stored(path: Path) -> None:
    """Delete an expert's file, or a link in its place; OSError if that fails, or nothing is there."""
    *folders, name = _parts(path, 4)
    with open_below(*folders) as block:
        os.unlink(name, dir_fd=block)


def block_folders(folder: Path) -> list[tuple[Stack, int, str]]:
    """Return the folders of sparse layers that a store has, with their names; none if it cannot be read."""
    try:
        with opened(folder) as handle:
            names = os.listdir(handle)  # noqa: PTH208 - pathlib cannot list what is open
    except OSError:
        return []
    matches = filter(None, map(_BLOCK.fullmatch, names))
    return sorted((cast(Stack, match[1]), int(match[2]), match[0]) for match in matches)


def stored_experts(folder: Path) -> Iterator[tuple[ExpertKey, os.stat_result]]:
    """Yield the experts that a store has; what vanishes meanwhile is left out, as is what is no file of its own."""
    for stack, block, name in block_folders(folder):
        with contextlib.suppress(OSError), opened(folder, name) as handle, os.scandir(handle) as entries:
            for entry in entries:
                match = _EXPERT.fullmatch(entry.name)
                with contextlib.suppress(OSError):
                    if match and entry.is_file(follow_symlinks=False):
                        yield ExpertKey(stack, block, int(match[1])), entry.stat(follow_symlinks=False)
