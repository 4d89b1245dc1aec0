"""Damage safetensors files in many ways, and compare what switchrun takes with what the safetensors library takes.

    python tools/fuzz_headers.py [COUNT] [SEED]

What switchrun takes and the library refuses, and tensors of which the two read other bytes, are faults; there are none.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from switchrun.checkpoint.files import open_weights
from switchrun.checkpoint.safetensors_file import read_safetensors
from switchrun.errors import CorruptCheckpointError

Header = dict[str, Any]
_DTYPES = ("F32", "BF16", "F16", "I8", "I64", "F64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X32", "f32", "")
_NUMBERS = (
    "0",
    "1",
    "-0",
    "-1",
    "1.0",
    "1e0",
    "NaN",
    "Infinity",
    "007",
    "4294967296",
    "9223372036854775808",
    "1" * 30,
    '"1"',
)
_JUNK = (" ", "\n", "\t", "\0", "\ufeff", "\u00a0", ",", "}", "[", '"', "\\", "null", "\\ud800", "/**/")


def compare(path: Path) -> tuple[str, str]:
    """Return who takes a file (both, library, switchrun, neither or other bytes), and why switchrun does not."""
    try:
        with safe_open(path, framework="pt") as file:
            known: list[str] | None = sorted(file.keys())
    except (SafetensorError, OSError):
        known = None
    try:
        with open_weights(path) as weights:
            ours = read_safetensors(weights)
    except CorruptCheckpointError as error:
        why = re.sub(r"tensor .* is malformed", "tensor … is malformed", str(error).removeprefix(f"{path}: "))
        return "neither" if known is None else "library", re.sub(r"\d+", "…", why)
    if known is None:
        return "switchrun", ""
    return "both" if sorted(ours) == known and _same_bytes(path) else "other bytes", ""


def _same_bytes(path: Path) -> bool:
    content = path.read_bytes()
    with open_weights(path) as weights:
        ours = read_safetensors(weights)
    with safe_open(path, framework="np") as file:
        for name, tensor in ours.items():
            described = file.get_slice(name)
            if (described.get_dtype(), tuple(described.get_shape())) != (tensor.dtype, tensor.shape):
                return False
            if tensor.nbytes and tensor.dtype in ("F32", "I64", "U8"):
                theirs = file.get_tensor(name).tobytes()
                if theirs != content[tensor.offset : tensor.offset + tensor.nbytes]:
                    return False
    return True


def mutants(seed: int) -> Iterator[bytes]:
    """Yield damaged files for ever."""
    source = random.Random(seed)
    while True:
        header, data = _original(source)
        for _ in range(source.choice((1, 1, 1, 2, 3))):
            with contextlib.suppress(TypeError, AttributeError):  # What was spoiled before cannot be edited again.
                source.choice(_EDITS)(source, header)
        text = json.dumps(header, separators=source.choice(((",", ":"), (", ", ": "))))
        for _ in range(source.choice((0, 0, 1, 1, 2))):
            text = source.choice(_TEXT_EDITS)(source, text)
        encoded = text.encode("utf-8", "surrogatepass")
        file = len(encoded).to_bytes(8, "little") + encoded + data
        for _ in range(source.choice((0, 0, 0, 1, 2))):
            file = source.choice(_BYTE_EDITS)(source, file)
        yield file


def _original(source: random.Random) -> tuple[Header, bytes]:
    header: Header = {"__metadata__": {"format": "pt"}} if source.random() < 0.5 else {}
    at = 0
    for number in range(source.randint(1, 5)):
        shape = [source.randint(0, 4) for _ in range(source.randint(0, 3))]
        dtype, itemsize = source.choice((("F32", 4), ("I64", 8), ("U8", 1)))
        length = itemsize
        for each in shape:
            length *= each
        header[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + length]}
        at += length
    return header, source.randbytes(at)


def _entry(source: random.Random, header: Header) -> Header:
    found = [value for value in header.values() if isinstance(value, dict) and "data_offsets" in value]
    return source.choice(found) if found else {"data_offsets": [0, 0], "shape": [0], "dtype": "F32"}


def _move(source: random.Random, header: Header) -> None:
    offsets = _entry(source, header)["data_offsets"]
    by = source.choice((-8, -4, -1, 1, 4, 8))
    for end in source.choice(((0,), (1,), (0, 1))):
        if end < len(offsets) and isinstance(offsets[end], int):
            offsets[end] += by


def _overlap(source: random.Random, header: Header) -> None:
    _entry(source, header)["data_offsets"] = list(_entry(source, header)["data_offsets"])


def _swap(source: random.Random, header: Header) -> None:
    one, other = _entry(source, header), _entry(source, header)
    one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]


def _drop(source: random.Random, header: Header) -> None:
    if header:
        del header[source.choice(list(header))]


def _add(source: random.Random, header: Header) -> None:
    at = source.choice((0, 4, 8, 16, 1 << 40))
    header[f"new{source.randint(0, 9)}"] = {"dtype": "F32", "shape": [0], "data_offsets": [at, at]}


def _reshape(source: random.Random, header: Header) -> None:
    shape = _entry(source, header)["shape"]
    shape.insert(source.randint(0, len(shape)), source.choice((0, 1, 2, 1 << 31, 1 << 62, (1 << 64) - 1, 1 << 64)))


def _retype(source: random.Random, header: Header) -> None:
    _entry(source, header)["dtype"] = source.choice(_DTYPES)


def _spoil(source: random.Random, header: Header) -> None:
    """Put a value of another kind somewhere."""
    entry = _entry(source, header)
    entry[source.choice(("dtype", "shape", "data_offsets", "more"))] = source.choice(
        (None, 1, "x", [], {}, [1, 2, 3], True)
    )


def _metadata(source: random.Random, header: Header) -> None:
    header["__metadata__"] = source.choice((None, {}, {"a": 1}, {"a": None}, [], "x", {"a": {"b": "c"}}, {"a": "b"}, 0))


def _rename(source: random.Random, header: Header) -> None:
    if header:
        name = source.choice(list(header))
        header[source.choice(("", "\ud800", "\0", "\x1b[31m", "é", "__metadata__", "t0"))] = header.pop(name)


def _nothing(source: random.Random, header: Header) -> None:
    del source, header


_EDITS: tuple[Callable[[random.Random, Header], None], ...] = (
    _move, _overlap, _swap, _drop, _add, _reshape, _retype, _spoil, _metadata, _rename, _nothing,
)  # fmt: skip


def _repeat(source: random.Random, text: str) -> str:
    """Have an entry, or one of its keys, twice."""
    found = list(re.finditer(r'"[^"]*": ?(\{[^{}]*\}|\[[^][]*\]|"[^"]*")', text))
    if not found:
        return text
    match = source.choice(found)
    return text[: match.end()] + "," + match[0] + text[match.end() :]


def _number(source: random.Random, text: str) -> str:
    found = list(re.finditer(r"\d+", text))
    if not found:
        return text
    match = source.choice(found)
    return text[: match.start()] + source.choice(_NUMBERS) + text[match.end() :]


def _junk(source: random.Random, text: str) -> str:
    at = source.choice((0, len(text), source.randint(0, len(text))))
    return text[:at] + source.choice(_JUNK) * source.choice((1, 1, 8)) + text[at:]


def _cut_text(source: random.Random, text: str) -> str:
    at = source.randint(0, len(text))
    return text[:at] + text[at + source.randint(1, 4) :]


_TEXT_EDITS = (_repeat, _number, _junk, _cut_text)


def _flip(source: random.Random, file: bytes) -> bytes:
    content = bytearray(file)
    if content:
        content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    return bytes(content)


def _length(source: random.Random, file: bytes) -> bytes:
    length = int.from_bytes(file[:8], "little")
    changed = source.choice((length - 8, length - 1, length + 1, length + 8, 0, 1 << 26, 1 << 40, (1 << 64) - 1))
    return (changed % (1 << 64)).to_bytes(8, "little") + file[8:]


def _cut(source: random.Random, file: bytes) -> bytes:
    return file[: source.randint(0, len(file))]


def _append(source: random.Random, file: bytes) -> bytes:
    return file + source.randbytes(source.randint(1, 16))


_BYTE_EDITS = (_flip, _flip, _length, _cut, _append)


def main() -> None:
    """Print how many of so many mutants each side takes; exit with 1 if there is a fault."""
    count, seed = (int(word) for word in (*sys.argv[1:], *("10000", "0")[len(sys.argv) - 1 :]))
    judged: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        for _, mutant in zip(range(count), mutants(seed), strict=False):
            path.write_bytes(mutant)
            verdict, why = compare(path)
            judged[verdict] += 1
            if verdict == "library":
                reasons[why] += 1
    print(f"{count} mutants, seed {seed}")
    print(f"taken by the library: {judged['both'] + judged['library'] + judged['other bytes']}")
    print(f"taken by switchrun: {judged['both'] + judged['switchrun'] + judged['other bytes']}")
    print(f"taken by switchrun, refused by the library: {judged['switchrun']}")
    print(f"taken by both, with other tensors or bytes: {judged['other bytes']}")
    print(f"refused by switchrun, taken by the library: {judged['library']}")
    for why, times in reasons.most_common():
        print(f"    {times}: {why}")
    sys.exit(bool(judged["switchrun"] or judged["other bytes"]))


if __name__ == "__main__":
    main()
