"""Whether a single tensor of a checkpoint is what the model needs: its shape, its dtype, and of int8 its scales."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from switchrun.checkpoint.files import open_weights, read_exactly
from switchrun.checkpoint.names import scales_of
from switchrun.checkpoint.types import TensorSlice, TensorTable
from switchrun.dtypes import WEIGHT_DTYPES
from switchrun.errors import CorruptCheckpointError, ModelError

#: bitsandbytes' number for the layout of a matrix that lies row by row.
_ROWS = 0


def check_tensor(tensors: TensorTable, name: str, shape: tuple[int, ...]) -> None:
    """See that a tensor has the right shape and a dtype that weights may have.

    Raises:
        CorruptCheckpointError: It has not.
    """
    tensor = tensors[name]
    check_shape(tensor, name, shape)
    if tensor.dtype not in WEIGHT_DTYPES:
        allowed = ", ".join(sorted(WEIGHT_DTYPES))
        raise CorruptCheckpointError(
            f"{tensor.file}: tensor {name} is stored as {tensor.dtype}, not as one of {allowed}"
        )


def check_shape(tensor: TensorSlice, name: str, shape: tuple[int, ...]) -> None:
    """See that a tensor has the right shape.

    Raises:
        CorruptCheckpointError: It has not.
    """
    if tensor.shape != shape:
        raise CorruptCheckpointError(
            f"{tensor.file}: tensor {name} has the shape {list(tensor.shape)}; by config.json it must be {list(shape)}"
        )


def check_int8(tensors: TensorTable, name: str, shape: tuple[int, ...], entry: Path) -> None:
    """See that a matrix in int8 has the right shape, and scales as bitsandbytes stores them.

    Raises:
        CorruptCheckpointError: It has not.
    """
    check_shape(tensors[name], name, shape)
    scales = scales_of(name)
    if scales not in tensors:
        raise missing_tensor(entry, scales)
    check_shape(tensors[scales], scales, shape[:1])
    if tensors[scales].dtype != "F32":
        raise CorruptCheckpointError(
            f"{tensors[scales].file}: tensor {scales} is stored as {tensors[scales].dtype}, not as F32"
        )


def with_scales(tensors: TensorTable, name: str) -> TensorSlice:
    """Give a tensor's slice, with that of its scales if it is a matrix in int8."""
    tensor = tensors[name]
    return replace(tensor, scales=tensors[scales_of(name)]) if tensor.dtype == "I8" else tensor


def check_rows(tensors: TensorTable, name: str) -> None:
    """See that a matrix in int8 lies row by row; before 0.45, bitsandbytes might save the tiles that a GPU wants.

    Raises:
        ModelError: It does not.
        CorruptCheckpointError: The file is truncated.
    """
    layout = f"{name}_format"
    if layout not in tensors or tensors[layout].nbytes != 1:
        return
    tensor = tensors[layout]
    try:
        with open_weights(tensor.file) as file:
            number = read_exactly(file, tensor.offset, 1)[0]
    except EOFError:
        raise CorruptCheckpointError(f"{tensor.file}: the file is truncated", "download it again") from None
    if number != _ROWS:
        raise ModelError(
            f"{tensor.file}: tensor {name} is not stored row by row (its weight_format is {number})",
            "save it again with bitsandbytes 0.45 or later, or give the original checkpoint",
        )


def missing_tensor(entry: Path, name: str) -> CorruptCheckpointError:
    """The error to raise for a tensor that the model needs and the checkpoint lacks."""
    return CorruptCheckpointError(
        f"{entry}: tensor {name} is missing", "the checkpoint is incomplete; download it again"
    )
