"""The header of a safetensors file: 8 bytes of length, that much JSON, then the tensors' bytes.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from switchrun.checkpoint.files import open_weights, read_exactly
from switchrun.checkpoint.types import Entry, plausible
from switchrun.dtypes import STORED_ITEMSIZE
from switchrun.errors import CorruptCheckpointError

#: The limit that the safetensors library itself sets.
_MAX_HEADER_BYTES = 100_000_000


def read_safetensors(path: Path) -> dict[str, Entry]:
    """Read which tensors a safetensors file holds, and where.

    Args:
        path: The file.

    Returns:
        The tensors by name. Their offsets count from the start of the file.

    Raises:
        CorruptCheckpointError: The file is truncated, or its header makes no sense.
    """
    with open_weights(path) as file:
        size = file.seek(0, 2)
        try:
            header_bytes = int.from_bytes(read_exactly(file, 0, 8), "little")
            if header_bytes > _MAX_HEADER_BYTES:
                raise CorruptCheckpointError(
                    f"{path}: not a safetensors file (its header would be {header_bytes} bytes)"
                )
            text = read_exactly(file, 8, header_bytes)
        except EOFError:
            raise _truncated(path, "it ends within its header") from None
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CorruptCheckpointError(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    return {name: _entry(path, name, value, start, size) for name, value in header.items()}


def _entry(path: Path, name: str, value: Any, start: int, size: int) -> Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptCheckpointError(f"{path}: the header's entry for tensor {name} is malformed") from error
    if type(dtype) is not str or not plausible((*shape, begin, end)) or begin > end:
        raise CorruptCheckpointError(f"{path}: the header's entry for tensor {name} is malformed")
    itemsize = STORED_ITEMSIZE.get(dtype)
    # A dtype unknown here is no weight's; a tensor that the model needs is refused later, by its dtype.
    if itemsize is not None and math.prod(shape) * itemsize != end - begin:
        raise CorruptCheckpointError(
            f"{path}: tensor {name} has {end - begin} bytes, but {dtype} {list(shape)} takes "
            f"{math.prod(shape) * itemsize}"
        )
    if start + end > size:
        raise _truncated(path, f"tensor {name} ends at byte {start + end}, the file at {size}")
    return Entry(start + begin, end - begin, dtype, shape)


def _truncated(path: Path, detail: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{path}: the file is truncated: {detail}", "download it again")
