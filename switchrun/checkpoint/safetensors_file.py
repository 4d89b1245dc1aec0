"""The header of a safetensors file: 8 bytes of length, that much JSON, then the tensors' bytes.

The format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from switchrun.checkpoint.files import WeightsFile, open_weights, plausible
from switchrun.checkpoint.types import TensorSlice
from switchrun.dtypes import STORED_ITEMSIZE
from switchrun.errors import CorruptCheckpointError

#: The limit that the safetensors library itself sets.
_MAX_HEADER_BYTES = 100_000_000


def read_safetensors(path: Path) -> dict[str, TensorSlice]:
    """Read which tensors a safetensors file holds, and where; CorruptCheckpointError if its header makes no sense."""
    with open_weights(path) as file:
        header_bytes = int.from_bytes(file.read(0, 8), "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise CorruptCheckpointError(f"{path}: not a safetensors file (its header would be {header_bytes} bytes)")
        text = file.read(8, header_bytes)
        try:
            header = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CorruptCheckpointError(f"{path}: its header is not valid JSON: {error}") from error
        if not isinstance(header, dict):
            raise CorruptCheckpointError(f"{path}: its header is not a JSON object")
        header.pop("__metadata__", None)
        return {name: _slice(file, name, value, 8 + header_bytes) for name, value in header.items()}


def _slice(file: WeightsFile, name: str, value: Any, start: int) -> TensorSlice:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        if type(dtype) is not str or not plausible((*shape, begin, end)) or begin > end:
            raise ValueError
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptCheckpointError(f"{file.path}: the header's entry for tensor {name} is malformed") from error
    itemsize = STORED_ITEMSIZE.get(dtype)
    # A dtype unknown here is no weight's; a tensor that the model needs is refused later, by its dtype.
    if itemsize is not None and math.prod(shape) * itemsize != end - begin:
        raise CorruptCheckpointError(
            f"{file.path}: tensor {name} has {end - begin} bytes, but {dtype} {list(shape)} takes "
            f"{math.prod(shape) * itemsize}"
        )
    if start + end > file.size:
        raise file.truncated(f"tensor {name} ends at byte {start + end}, the file at {file.size}")
    return TensorSlice(file.path, offset=start + begin, nbytes=end - begin, dtype=dtype, shape=shape)
