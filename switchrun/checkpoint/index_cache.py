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

from switchrun.checkpoint.types import FileStamp, Index, Kind
from switchrun.machine.folders import cache_folder

_VERSION = 1


def default_cache_dir() -> Path:
    """Return the folder for indexes: `index` in `SWITCHRUN_CACHE`, or in the user's cache folder."""
    return cache_folder() / "index"


def read_cache(cache_dir: Path, entry: Path) -> Index | None:
    """Return the index that belongs to an entry; None if there is none, or a file has changed since.

    Args:
        cache_dir: Where indexes are kept.
        entry: The file from which the others are found, in the checkpoint's resolved folder.
    """
    folder = entry.parent
    try:
        checksum, text = _cache_file(cache_dir, folder).read_bytes().split(b"\n", 1)
        if checksum != _checksum(text):
            return None
        record = json.loads(text)
        if (record["version"], record["folder"], record["entry"]) != (_VERSION, str(folder), entry.name):
            return None
        stamps = tuple(FileStamp(*row) for row in record["stamps"])
        if any(stamp(folder, folder / old.name) != old for old in stamps):
            return None
        places = zip(record["file"], record["offset"], record["kind"], strict=True)
        return Index(
            entry=entry,
            files=tuple(folder / name for name in record["files"]),
            kinds=tuple(Kind(nbytes, dtype, tuple(shape), flag) for nbytes, dtype, shape, flag in record["kinds"]),
            rows=dict(zip(record["name"], places, strict=True)),
            stamps=stamps,
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cache(cache_dir: Path, index: Index) -> None:
    """Keep an index; a cache that cannot be written is no reason to fail."""
    folder = index.entry.parent
    file, offset, kind = zip(*index.rows.values(), strict=True) if index.rows else ((), (), ())
    record = {
        "version": _VERSION,
        "folder": str(folder),
        "entry": index.entry.name,
        "stamps": index.stamps,
        "files": [path.relative_to(folder).as_posix() for path in index.files],
        "kinds": index.kinds,
        "name": list(index.rows),
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


def stamp(folder: Path, path: Path) -> FileStamp:
    """Return a file's name, size and time of modification.

    Raises:
        OSError: There is no such file any more.
    """
    status = path.stat()
    return FileStamp(path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns)


def fingerprint(stamps: Iterable[FileStamp], content: str = "") -> str:
    """Return one hash of all stamps, which changes when any file does.

    Args:
        stamps: Of all files.
        content: What identifies their content, such as a commit. It takes the place of their times, which another
            download or installation of the same files changes.
    """
    lines = "".join(f"{name}\0{size}\0{content or mtime_ns}\n" for name, size, mtime_ns in sorted(stamps))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()
