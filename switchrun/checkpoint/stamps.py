"""How a changed file is noticed: by its name, size and time of modification."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


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
