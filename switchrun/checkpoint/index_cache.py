"""Keeps parsed indexes: reading 364 headers takes seconds, reading this takes a fraction of one.

A cached index is one line with a checksum and one of JSON, in columns, so that 120,000 tensors are four lists and not
120,000 small ones. Whatever is wrong with it, it counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from switchrun.checkpoint.types import Kind, TensorTable
from switchrun.machine.folders import cache_folder

_VERSION = 1


def default_cache_dir() -> Path:
    """The folder for indexes: `index` in `SWITCHRUN_CACHE`, or in the user's cache folder."""
    return cache_folder() / "index"


def read_cache(cache_dir: Path, folder: Path, entry: str) -> tuple[TensorTable, tuple[FileStamp, ...]] | None:
    """Take a folder's index from the cache.

    Args:
        cache_dir: Where indexes are kept.
        folder: The checkpoint, resolved.
        entry: The name of the file from which the others are found.

    Returns:
        The tensors and the stamps; None if there is no index, or it is damaged, or a file has changed since.
    """
    try:
        checksum, text = _cache_file(cache_dir, folder).read_bytes().split(b"\n", 1)
        if checksum != _checksum(text):
            return None
        record = json.loads(text)
        if (record["version"], record["folder"], record["entry"]) != (_VERSION, str(folder), entry):
            return None
        stamps = tuple(FileStamp(*row) for row in record["stamps"])
        if any(stamp(folder, folder / old.name) != old for old in stamps):
            return None
        kinds = tuple(Kind(nbytes, dtype, tuple(shape), flag) for nbytes, dtype, shape, flag in record["kinds"])
        places = zip(record["file"], record["offset"], record["kind"], strict=True)
        rows = dict(zip(record["name"], places, strict=True))
        return TensorTable(tuple(folder / name for name in record["files"]), kinds, rows), stamps
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cache(cache_dir: Path, folder: Path, entry: str, tensors: TensorTable, stamps: tuple[FileStamp, ...]) -> None:
    """Keep a folder's index; a cache that cannot be written to is no reason to fail."""
    file, offset, kind = zip(*tensors.rows.values(), strict=True) if tensors.rows else ((), (), ())
    record = {
        "version": _VERSION,
        "folder": str(folder),
        "entry": entry,
        "stamps": stamps,
        "files": [path.relative_to(folder).as_posix() for path in tensors.files],
        "kinds": tensors.kinds,
        "name": list(tensors.rows),
        "file": file,
        "offset": offset,
        "kind": kind,
    }
    temporary = None
    try:
        text = json.dumps(record, separators=(",", ":")).encode()
        cache_dir.mkdir(parents=True, exist_ok=True)
        # A name of its own: two processes may index the same folder at once.
        handle, temporary = tempfile.mkstemp(dir=cache_dir, suffix=".tmp")
        with open(handle, "wb") as file_object:
            file_object.write(_checksum(text) + b"\n" + text)
        Path(temporary).replace(_cache_file(cache_dir, folder))
    except (OSError, ValueError):
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _cache_file(cache_dir: Path, folder: Path) -> Path:
    name = hashlib.sha256(str(folder).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_dir / f"{name}.json"


def _checksum(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


class FileStamp(NamedTuple):
    """One file as it was when it was read; `name` is relative to the checkpoint's folder."""

    name: str
    size: int
    mtime_ns: int


def stamp(folder: Path, path: Path) -> FileStamp:
    """Stamp one file.

    Raises:
        OSError: There is no such file any more.
    """
    status = path.stat()
    return FileStamp(path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns)


def fingerprint(stamps: Iterable[FileStamp], content: str = "") -> str:
    """One hash of all stamps: another one if any file has changed.

    Args:
        stamps: Of all files.
        content: What tells their content apart, such as a commit. Then their times count for nothing, which another
            download or installation of the same files changes.
    """
    lines = "".join(f"{name}\0{size}\0{content or mtime_ns}\n" for name, size, mtime_ns in sorted(stamps))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
