"""Where the tensors lie in a safetensors file, by its header alone.

What the safetensors library refuses is refused here: each would be another tensor's bytes, or none's. The library lets
some odd headers pass that no saver writes, and this does not: two entries of one name, entries with other keys or
without any.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import Any

from switchrun.checkpoint.files import MOST_JSON_BYTES, NO_TURN, Weights, parse_json, plausible, truncated
from switchrun.checkpoint.types import TensorSlice
from switchrun.dtypes import STORED_ITEMSIZE
from switchrun.errors import CorruptCheckpointError, printable

#: What no weight is stored in, but other tensors may be; bits of an element.
_OTHER_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "U32": 32, "U64": 64, "C64": 64,
}  # fmt: skip
#: A number below zero, perhaps; JSON has a negative zero too, which is no whole number to the library.
_NEGATIVE = re.compile(rb"[:,\[]\s*-\d")
_BITS = {dtype: 8 * itemsize for dtype, itemsize in STORED_ITEMSIZE.items()} | _OTHER_BITS


def read_safetensors(file: Weights, turn: AbstractContextManager[object] = NO_TURN) -> dict[str, TensorSlice]:
    """Read which tensors a safetensors file holds, and where; CorruptCheckpointError if its header makes no sense.

    What takes much memory is done in `turn`, such as a lock that other readers share.
    """
    header_bytes = int.from_bytes(file.read(0, 8), "little")
    if header_bytes > MOST_JSON_BYTES:
        raise CorruptCheckpointError(f"{file.place}: not a safetensors file (its header would be {header_bytes} bytes)")
    try:
        with turn:
            text = file.read(8, header_bytes)
            hooks = {"parse_int": _natural} if _NEGATIVE.search(text) else {}
            header = parse_json(text, object_pairs_hook=_without_doubles, **hooks)
    except ValueError as error:
        raise CorruptCheckpointError(f"{file.place}: its header is not valid: {error}") from error
    if not isinstance(header, dict):
        raise CorruptCheckpointError(f"{file.place}: its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(map(_is_text, (*metadata, *metadata.values())))
    ):
        raise CorruptCheckpointError(f"{file.place}: its header's __metadata__ is not made of texts")
    if not all(map(_is_text, header)):
        raise CorruptCheckpointError(f"{file.place}: a tensor's name is not valid Unicode")
    start = 8 + header_bytes
    tensors = {name: _slice(file, name, value, start) for name, value in header.items()}
    _check_cover(file, tensors, start)
    return tensors


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Return how many bytes a tensor takes; None for an unknown dtype, part of a byte, or more than a file can have."""
    bits = _BITS.get(dtype)
    if bits is None:
        return None
    for length in shape:
        bits *= length
        if bits >= 1 << 64:
            return None
    return None if bits % 8 else bits // 8


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _natural(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError("a number is negative")
    return int(digits)


def _is_text(value: object) -> bool:
    """Whether it is a text without halves of characters, which JSON can escape and nothing can write."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _slice(file: Weights, name: str, value: Any, start: int) -> TensorSlice:
    try:
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if len(value) > 3 or type(dtype) is not str or type(shape) is not list or type(offsets) is not list:
            raise ValueError
        begin, end = offsets
        if not plausible((*shape, begin, end)) or begin > end:
            raise ValueError
        shape = tuple(shape)
    except (TypeError, KeyError, ValueError) as error:
        raise CorruptCheckpointError(
            f"{file.place}: the header's entry for tensor {printable(name, 200)} is malformed"
        ) from error
    if dtype not in _BITS:
        raise CorruptCheckpointError(
            f"{file.place}: tensor {printable(name, 200)} is stored as {printable(dtype, 50)}, which is no known dtype"
        )
    nbytes = tensor_bytes(dtype, shape)
    if nbytes != end - begin:
        taken = f"{dtype} {list(shape)} takes {'what is impossible' if nbytes is None else nbytes}"
        raise CorruptCheckpointError(
            f"{file.place}: tensor {printable(name, 200)} has {end - begin} bytes, but {taken}"
        )
    if start + end > file.size:
        raise truncated(file, f"tensor {printable(name, 200)} ends at byte {start + end}, the file at {file.size}")
    return TensorSlice(file.place, offset=start + begin, nbytes=end - begin, dtype=dtype, shape=shape)


def _check_cover(file: Weights, tensors: dict[str, TensorSlice], start: int) -> None:
    """Raise CorruptCheckpointError unless each byte after the header belongs to just one tensor."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise CorruptCheckpointError(
                f"{file.place}: tensor {printable(name, 200)} begins at byte {tensor.offset}, not where the one before "
                f"it ends ({end})",
                file.remedy,
            )
        end += tensor.nbytes
    if end != file.size:
        raise CorruptCheckpointError(
            f"{file.place}: its tensors end at byte {end}, the file at {file.size}", file.remedy
        )
