"""Opening a checkpoint's files, with the system's errors told as ours."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from switchrun.errors import CorruptCheckpointError

_LFS_POINTER = b"version https://git-lfs"


@contextmanager
def open_weights(path: Path) -> Iterator[BinaryIO]:
    """Open a weights file for reading its headers.

    Raises:
        CorruptCheckpointError: It is empty, a Git LFS pointer, or the system refuses to read it.
    """
    try:
        # Unbuffered: headers are read whole, and a buffer would read ahead into the weights.
        with open(path, "rb", buffering=0) as file:
            start = read_exactly(file, 0, len(_LFS_POINTER), at_most=True)
            if not start:
                raise CorruptCheckpointError(f"{path}: the file is empty", "download it again")
            if start == _LFS_POINTER:
                raise CorruptCheckpointError(
                    f"{path}: this is a Git LFS pointer, not the weights", "run `git lfs pull` in its folder"
                )
            yield file
    except OSError as error:
        raise unreadable(path, error) from error


def read_exactly(file: Any, offset: int, length: int, *, at_most: bool = False) -> bytes:
    """Read `length` bytes at `offset`; fewer only at the end of the file, and only if `at_most`.

    Raises:
        EOFError: The file ends before that.
    """
    file.seek(offset)
    parts: list[bytes] = []
    missing = length
    while missing and (part := file.read(missing)):
        parts.append(part)
        missing -= len(part)
    if missing and not at_most:
        raise EOFError
    return b"".join(parts)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        CorruptCheckpointError: It is not JSON, not an object, or cannot be read.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{path}: a JSON object was expected, not a {type(value).__name__}")
    return value


def unreadable(path: Path, error: OSError) -> CorruptCheckpointError:
    """The error to raise when the system refuses to read a file, with the system's reason."""
    return CorruptCheckpointError(f"{path}: cannot be read: {error.strerror or error}")
