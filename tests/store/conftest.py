"""Stores of small experts, and filesystems that are small or read-only."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from switchrun.checkpoint.types import ExpertKey
from switchrun.store import ExpertStore, Layout
from switchrun.store.layout import int8_layout
from switchrun.store.manifest import Manifest

#: Sizes that are multiples of nothing.
LAYOUT = int8_layout(d_model=33, d_ff=65)
MODEL = "google/switch-base-8"

Mount = Callable[..., Path]


def key(expert: int, block: int = 1) -> ExpertKey:
    return ExpertKey("encoder", block, expert)


def data_of(expert: int, layout: Layout = LAYOUT) -> bytes:
    return random.Random(expert).randbytes(layout.nbytes)


def open_store(offload: Path, warnings: list[str] | None = None, **options: Any) -> ExpertStore:
    manifest = {"model": MODEL, "fingerprint": "f1", "dtype": "int8", "layout": LAYOUT}
    manifest |= {name: options.pop(name) for name in manifest if name in options}
    warn = warnings.append if warnings is not None else pytest.fail
    return ExpertStore(offload, Manifest(**manifest), **options, warn=warn)


def read(store: ExpertStore, expert: ExpertKey) -> bytes | None:
    """Read an expert as the fill does, without looking at the checksum."""
    stored = store.find(expert)
    if stored is None:
        return None
    with open(stored.path, "rb") as file:
        return os.pread(file.fileno(), stored.nbytes, stored.offset)


def holds(store: ExpertStore, expert: int) -> bool:
    """Whether a store gives an expert's very bytes, and says so itself."""
    data = read(store, key(expert))
    return data == data_of(expert, store.layout) and store.verify(key(expert), data)


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        byte = os.pread(file.fileno(), 1, position)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1]), position)


def temporaries(folder: Path) -> list[Path]:
    return list(folder.glob(".*.tmp"))


def no_temporaries(store: ExpertStore) -> bool:
    """Whether nothing half-written is left: only the manifest, and folders with experts."""
    files = [path.name for path in store.folder.rglob("*") if path.is_file()]
    return not temporaries(store.folder) and all(name.endswith((".safetensors", ".json")) for name in files)


@pytest.fixture
def offload(tmp_path: Path) -> Path:
    """Not `offload`, which would be the default in the folder that the tests run in."""
    return tmp_path / "tier"


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Mount]:
    """Give a function that mounts a filesystem of a size, or changes one's options; it skips where that is refused."""
    points: list[Path] = []

    def mount(options: str, again: Path | None = None) -> Path:
        point = again or tmp_path / f"mount{len(points)}"
        point.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(point)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode != 0:
            pytest.skip(f"may not mount: {done.stderr.strip()}")
        if again is None:
            points.append(point)
        return point

    yield mount
    for point in points:
        subprocess.run(["umount", str(point)], check=True, timeout=10)
