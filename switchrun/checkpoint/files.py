"""Opens a checkpoint's files, with the system's errors turned into ours, and parses JSON that nobody vouches for."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from switchrun.checkpoint.types import RemoteFile
from switchrun.errors import CorruptCheckpointError
from switchrun.machine.files import open_regular, read_regular
from switchrun.units import MIB

#: The configuration of a real model has a few KiB.
MOST_CONFIG_BYTES = 16 * MIB
#: An index JSON, a header or a cached index. switch-c-2048 in int8 has 45 MiB of index, with 370,000 tensors.
MOST_JSON_BYTES = 64 * MIB
#: What a text may hold, with an object or list counted as four and anything else as one: whatever it is, it then takes
#: less than 700 MiB to parse. That index has 0.7 million, a header of 190,000 tensors 4.
_MOST_PARTS = 4_000_000
#: For who reads one header at a time.
NO_TURN = nullcontext()
_LFS_POINTER = b"version https://git-lfs"


class Weights(Protocol):
    """A weights file that is open for reading its headers, wherever it is.

    Attributes:
        place: Where it is; errors begin with it.
        size: In bytes.
        remedy: What to do if it is damaged.
    """

    @property
    def place(self) -> Path | RemoteFile:
        """See above."""

    @property
    def size(self) -> int:
        """See above."""

    @property
    def remedy(self) -> str:
        """See above."""

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes from `offset`, or raise CorruptCheckpointError if the file ends before that."""


class WeightsFile:
    """`Weights` on a disk; see `open_weights`."""

    remedy = "download it again"

    def __init__(self, path: Path, descriptor: int) -> None:
        self.place = path
        self.size = os.fstat(descriptor).st_size
        self._descriptor = descriptor

    def read(self, offset: int, length: int) -> bytes:
        """As `Weights` says."""
        parts: list[bytes] = []
        end = offset + length
        while offset < min(end, self.size) and (part := os.pread(self._descriptor, end - offset, offset)):
            parts.append(part)
            offset += len(part)
        if offset < end:
            raise truncated(self, f"it has {self.size} bytes, not {end} or more")
        return b"".join(parts)


@contextmanager
def open_weights(path: Path) -> Iterator[WeightsFile]:
    """Open a weights file to read headers; CorruptCheckpointError if it is empty, a Git LFS pointer, or unreadable."""
    try:
        descriptor = open_regular(path)
        try:
            weights = WeightsFile(path, descriptor)
            check_weights(weights, "run `git lfs pull` in its folder")
            yield weights
        finally:
            os.close(descriptor)
    except OSError as error:
        raise unreadable(path, error) from error


def check_weights(file: Weights, pull: str) -> None:
    """Raise CorruptCheckpointError for an empty file or a Git LFS pointer; `pull` is the hint to get what it is of."""
    if not file.size:
        raise CorruptCheckpointError(f"{file.place}: the file is empty", file.remedy)
    if file.read(0, min(file.size, len(_LFS_POINTER))) == _LFS_POINTER:
        raise CorruptCheckpointError(f"{file.place}: this is a Git LFS pointer, not the weights", pull)


def truncated(file: Weights, detail: str) -> CorruptCheckpointError:
    """The error to raise for a file that ends too early."""
    return CorruptCheckpointError(f"{file.place}: the file is truncated: {detail}", file.remedy)


def plausible(numbers: Iterable[object]) -> bool:
    """Whether a header's sizes and offsets are whole numbers that a tensor can have.

    Files are not to be trusted: beyond 64 bits even to print a number can fail.
    """
    values = list(numbers)
    return len(values) < 100 and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def read_json_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """Read a JSON file that holds one object, or raise CorruptCheckpointError if it does not."""
    try:
        value = parse_json(read_regular(path, most_bytes))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise CorruptCheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{path}: a JSON object was expected, not a {type(value).__name__}")
    return value


def parse_json(text: bytes, **hooks: Any) -> Any:
    """Parse JSON in UTF-8; ValueError if it is damaged, nested too deeply, or would take too much memory."""
    if text.startswith(codecs.BOM_UTF8):
        raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
    parts = 4 * (text.count(b"{") + text.count(b"[")) + text.count(b",") + text.count(b":")
    if parts > _MOST_PARTS:
        raise ValueError("it has more values than any model needs")
    try:
        # Decoded here: json.loads would take UTF-16 too, which the libraries refuse.
        return json.loads(text.decode(), **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unreadable(path: Path, error: OSError) -> CorruptCheckpointError:
    """The error to raise when the system refuses to read a file, with the system's reason."""
    return CorruptCheckpointError(f"{path}: cannot be read: {error.strerror or error}")
