"""Where each thing lies in a store's folder, and what is found there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from switchrun.checkpoint.locate import demo_folder
from switchrun.checkpoint.types import ExpertKey, Stack, SwitchCheckpoint

_BLOCK = re.compile(r"(encoder|decoder)\.(0|[1-9][0-9]*)", re.ASCII)
_EXPERT = re.compile(r"(0|[1-9][0-9]*)\.safetensors", re.ASCII)


def model_name(checkpoint: SwitchCheckpoint) -> str:
    """Give what a store calls a model, the same from any folder: `id@revision`, the checkpoint's folder, or `demo`."""
    if checkpoint.revision is not None:
        return f"{checkpoint.id}@{checkpoint.revision}"
    # Not by its id: a folder of the user's may be called demo too.
    return "demo" if checkpoint.path == demo_folder() else str(checkpoint.path)


def expert_path(folder: Path, key: ExpertKey) -> Path:
    """Give the file of one expert."""
    return folder / f"{key.stack}.{key.block}" / f"{key.expert}.safetensors"


def block_folders(folder: Path) -> list[tuple[Stack, int, Path]]:
    """Give the folders of sparse layers that a store has; none if it cannot be read."""
    found = []
    for name in _names(folder):
        match = _BLOCK.fullmatch(name)
        if match:
            found.append((cast(Stack, match[1]), int(match[2]), folder / name))
    return sorted(found)


def stored_experts(folder: Path) -> Iterator[tuple[ExpertKey, os.stat_result]]:
    """Go through the experts that a store has; what vanishes meanwhile is left out."""
    for stack, block, block_folder in block_folders(folder):
        try:
            with os.scandir(block_folder) as entries:
                for entry in entries:
                    match = _EXPERT.fullmatch(entry.name)
                    if match is None:
                        continue
                    try:
                        if entry.is_file(follow_symlinks=False):
                            yield ExpertKey(stack, block, int(match[1])), entry.stat(follow_symlinks=False)
                    except OSError:
                        continue
        except OSError:
            continue


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 - names alone are wanted
    except OSError:
        return []
