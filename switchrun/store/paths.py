"""What a store's folders and files are called, and what is found there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from switchrun.checkpoint.locate import demo_folder
from switchrun.checkpoint.types import ExpertKey, Stack, SwitchCheckpoint
from switchrun.errors import command
from switchrun.machine.folders import DTYPE_NAME, offload_folder

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


def block_folders(folder: Path) -> list[tuple[Stack, int, Path]]:
    """Return the folders of sparse layers that a store has; none if it cannot be read."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - names alone are wanted
    except OSError:
        return []
    matches = filter(None, map(_BLOCK.fullmatch, names))
    return sorted((cast(Stack, match[1]), int(match[2]), folder / match[0]) for match in matches)


def stored_experts(folder: Path) -> Iterator[tuple[ExpertKey, os.stat_result]]:
    """Yield the experts that a store has; what vanishes meanwhile is left out."""
    for stack, block, block_folder in block_folders(folder):
        with contextlib.suppress(OSError), os.scandir(block_folder) as entries:
            for entry in entries:
                match = _EXPERT.fullmatch(entry.name)
                with contextlib.suppress(OSError):
                    if match and entry.is_file(follow_symlinks=False):
                        yield ExpertKey(stack, block, int(match[1])), entry.stat(follow_symlinks=False)
