"""Opens a checkpoint's files, with the system's errors turned into ours."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from switchrun.errors import CorruptCheckpointError

_LFS_POINTER = b"version https://git-lfs"


class WeightsFile:
    """A weights file that is open for reading its headers, and its size in bytes; see `open_weights`."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = file.seek(0, os.SEEK_END)

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset`, or raise CorruptCheckpointError if the file ends before that."""
        self.file.seek(offset)
        data = bytearray()
        while len(data) < length and (part := self.file.read(length - len(data))):
            data += part
        if len(data) < length:
            raise self.truncated(f"it has {self.size} bytes, not {offset + length} or more")
        return bytes(data)

    def truncated(self, detail: str) -> CorruptCheckpointError:
        """The error to raise for a file that ends too early."""
        return CorruptCheckpointError(f"{self.path}: the file is truncated: {detail}", "download it again")


@contextmanager
def open_weights(path: Path) -> Iterator[WeightsFile]:
    """Open a weights file to read headers; CorruptCheckpointError if it is empty, a Git LFS pointer, or unreadable."""
    try:
        # Unbuffered: headers are read whole, and a buffer would read ahead into the weights.
        with open(path, "rb", buffering=0) as file:
            weights = WeightsFile(path, file)
            if not weights.size:
                raise CorruptCheckpointError(f"{path}: the file is empty", "download it again")
            if weights.read(0, min(weights.size, len(_LFS_POINTER))) == _LFS_POINTER:
                raise CorruptCheckpointError(
                    f"{path}: this is a Git LFS pointer, not the weights", "run `git lfs pull` in its folder"
                )
            yield weights
    except OSError as error:
        raise unreadable(path, error) from error


def plausible(numbers: Iterable[object]) -> bool:
    """Whether a header's sizes and offsets are whole numbers that a tensor can have.

    Files are not to be trusted: beyond 64 bits even to print a number can fail.
    """
    values = list(numbers)
    return len(values) < 100 and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds one object, or raise CorruptCheckpointError if it does not."""
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
