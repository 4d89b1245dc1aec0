"""Ways to damage a file: strategies of edits, and how each is carried out."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

#: What a JSON file may hold in the place of what is meant.
_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 127, 128, 2**31, 2**63, 10**30, 10**5000, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "x", "F32", "BF16", "I8", "float16", "\x1b[31mred\x07", "../secret/file",
    "/etc/passwd", "a" * 100_000, "\ud800", [], {}, [1, 2], [[0, 1]], {"a": {"b": []}}, "deep",
)  # fmt: skip
_DEEP = "[" * 3000 + "]" * 3000
_KEYS = ("", "x", "__metadata__", "shared.weight", "lm_head.weight", "auto_map", "\x1b[31m", "a" * 1000, "model_type")
#: Pieces of pickle: opcodes with arguments that make something unusual of what is on the stack.
_OPCODES = (
    b"N", b"K\x01", b"]", b"}", b")", b"(", b"0", b"1", b"2", b"u", b"s", b"e", b"a", b"t", b"\x85", b"\x86", b"\x87",
    b"R", b"b", b"Q", b"\x81", b"\x82\x01", b"\x8f", b"\x90", b"\x91", b"\x92", b"\x93", b"\x94", b"P1\n",
    b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"h\x00", b"\x8b\xff\xff\xff\x7f", b"\x96\x00\x00\x00\x7f",
    b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"cos\nsystem\n", b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"X\x01\x00\x00\x00a",
    b"\x85" * 5000, b"2\x86" * 40, b"(" * 5000, b"]\x94h\x00a", b"I999999999999999999999\n", b"Fnan\n", b".",
)  # fmt: skip

#: Changes a file in the folder.
Edit = Callable[[Path], None]


@dataclass(frozen=True)
class Named:
    """An edit that Hypothesis can show."""

    name: str
    edit: Edit

    def __repr__(self) -> str:
        return self.name


def _bytes_edit(data: bytes, action: str, at: int, length: int, new: bytes) -> bytes:
    at %= len(data) + 1
    if action == "flip":
        return data[:at] + new + data[at + len(new) :]
    if action == "insert":
        return data[:at] + new + data[at:]
    if action == "cut":
        return data[:at] + data[at + length :]
    if action == "truncate":
        return data[:at]
    return data[:at] + data[at : at + length] + data[at:]  # double


@st.composite
def byte_edits(draw: st.DrawFn, within: int | None = None) -> Named:
    """Change bytes somewhere in a file, or among its first `within`."""
    action = draw(st.sampled_from(["flip", "insert", "cut", "truncate", "double"]))
    at = draw(st.integers(0, (within or 1 << 20) - 1))
    length = draw(st.integers(1, 64))
    new = draw(st.binary(min_size=1, max_size=8))

    def edit(path: Path) -> None:
        path.write_bytes(_bytes_edit(path.read_bytes(), action, at, length, new))

    return Named(f"bytes({action}, {at}, {length}, {new!r})", edit)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object that may have a key twice."""


def _write(value: Any) -> str:
    if value == "deep":
        return _DEEP
    if isinstance(value, _Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {_write(each)}" for key, each in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_write, value)) + "]"
    return json.dumps(value) if not isinstance(value, int) or abs(value) < 10**4000 else "1" + "0" * 5000


def _places(value: Any, found: list[tuple[list[Any], int]]) -> list[tuple[list[Any], int]]:
    if isinstance(value, list):
        for number, each in enumerate(value):
            found.append((value, number))
            _places(each[1] if isinstance(value, _Pairs) else each, found)
    return found


@st.composite
def json_changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Change one place of a JSON text."""
    action = draw(st.sampled_from(["value", "value", "value", "delete", "double", "key", "swap"]))
    at = draw(st.integers(0, 1 << 20))
    other = draw(st.integers(0, 1 << 20))
    value = draw(st.sampled_from(range(len(_VALUES))))
    key = draw(st.sampled_from(_KEYS))

    def change(text: bytes) -> bytes:
        try:
            whole = json.loads(text, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError):
            return text[: at % (len(text) + 1)]
        places = _places(whole, [])
        if not places:
            return _write(_VALUES[value]).encode()
        parent, number = places[at % len(places)]
        if action == "delete":
            del parent[number]
        elif action == "double":
            parent.append(parent[number])
        elif action == "swap":
            other_parent, other_number = places[other % len(places)]
            if isinstance(parent, _Pairs) and isinstance(other_parent, _Pairs):
                parent[number] = (parent[number][0], other_parent[other_number][1])
        elif isinstance(parent, _Pairs):
            old = parent[number]
            parent[number] = (key, old[1]) if action == "key" else (old[0], _VALUES[value])
        else:
            parent[number] = _VALUES[value]
        try:
            return _write(whole).encode("utf-8", "surrogatepass")
        except RecursionError:
            return text

    change.__name__ = f"{action}@{at} {_VALUES[value] if value < 30 else '…'!r:.20} {key!r:.20} {other}"
    return change


@st.composite
def json_edits(draw: st.DrawFn) -> Named:
    """Change a JSON file by its structure."""
    changes = draw(st.lists(json_changes(), min_size=1, max_size=2))

    def edit(path: Path) -> None:
        data = path.read_bytes()
        for change in changes:
            data = change(data)
        path.write_bytes(data)

    return Named(f"json({[change.__name__ for change in changes]})", edit)


@st.composite
def header_edits(draw: st.DrawFn) -> Named:
    """Change the header of a safetensors file by its structure; its length may lie."""
    changes = draw(st.lists(json_changes(), min_size=0, max_size=2))
    lie = draw(st.sampled_from([0, 0, 0, 0, 1, -1, 8, 1 << 40]))
    more = draw(st.sampled_from([b"", b"", b"", b"\0", b"more"]))

    def edit(path: Path) -> None:
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
        header = data[8 : 8 + length]
        for change in changes:
            header = change(header)
        path.write_bytes(struct.pack("<Q", max(len(header) + lie, 0)) + header + data[8 + length :] + more)

    return Named(f"header({[change.__name__ for change in changes]}, {lie}, {more!r})", edit)


@st.composite
def pickle_edits(draw: st.DrawFn) -> Named:
    """Change the pickle in a torch file, or a file of its archive."""
    target = draw(st.sampled_from(["data.pkl", "data.pkl", "data.pkl", "byteorder", "data/0"]))
    changes = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["insert", "insert", "flip", "cut", "truncate", "double"]),
                st.integers(0, 1 << 16),
                st.integers(1, 64),
                st.one_of(st.sampled_from(_OPCODES), st.binary(min_size=1, max_size=8)),
            ),
            min_size=1,
            max_size=3,
        )
    )

    def edit(path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                entries = [(name, archive.read(name)) for name in archive.namelist()]
        except (zipfile.BadZipFile, OSError):
            return
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries:
                changed = data
                for change in changes if name.endswith(target) else ():
                    changed = _bytes_edit(changed, *change)
                archive.writestr(name, changed)

    return Named(f"pickle({target}, {[(a, b, c, d[:20]) for a, b, c, d in changes]})", edit)


def _replaced(make: Callable[[Path], object]) -> Edit:
    def edit(path: Path) -> None:
        path.unlink()
        make(path)

    return edit


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(20 << 30)


_SPECIAL = tuple(
    Named(name, _replaced(make))
    for name, make in {
        "fifo": os.mkfifo,
        "folder": Path.mkdir,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "loop": lambda path: path.symlink_to(path.name),
        "outside": lambda path: path.symlink_to("../secret/file"),
        "nowhere": lambda path: path.symlink_to("nowhere"),
        "sparse": _sparse,
        "empty": lambda path: path.write_bytes(b""),
        "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        "gone": lambda _: None,
    }.items()
)


def edits(kind: str) -> st.SearchStrategy[Named]:
    """Edits of a file of a kind: `json`, `header`, `pickle`, or any other for bytes alone."""
    special = st.sampled_from(_SPECIAL)
    if kind == "json":
        return st.one_of(json_edits(), json_edits(), json_edits(), byte_edits(), special)
    if kind == "header":
        return st.one_of(header_edits(), header_edits(), byte_edits(8000), byte_edits(), special)
    if kind == "pickle":
        return st.one_of(pickle_edits(), pickle_edits(), byte_edits(), special)
    return st.one_of(byte_edits(), special)
