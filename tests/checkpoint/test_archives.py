"""Torch's zip archives whose directory lies."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from torch.utils.serialization import config

from switchrun.checkpoint.range_check import check_header
from switchrun.checkpoint.types import TensorSlice
from switchrun.errors import CorruptCheckpointError
from tests.support.headers import read_torch

#: Fields of a directory entry by their place in it, and of the end record.
METHOD, PACKED, SIZE, NAME_BYTES, PLACE = 10, 20, 24, 28, 42
COUNT, DIRECTORY_BYTES, DIRECTORY, COMMENT = 10, 12, 16, 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "x.bin"
    torch.save({"a": torch.arange(8.0), "b": torch.arange(8.0) + 8}, file)
    return file


def directory_entry(data: bytes, name: bytes) -> int:
    """Where the directory's entry of that name begins."""
    at = data.index(b"PK\x01\x02")
    while not data[at + 46 :].startswith(name):
        at = data.index(b"PK\x01\x02", at + 4)
    return at


def patch(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def refused(path: Path, message: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        read_torch(path)
    assert str(path) in caught.value.message


def test_one_storage_in_place_of_another(path: Path) -> None:
    data = path.read_bytes()
    one, other = (directory_entry(data, b"x/data/" + key) for key in (b"0", b"1"))
    patch(path, other + PLACE, data[one + PLACE : one + PLACE + 4])
    refused(path, "not where its directory says|overlap")


def test_a_storage_that_reaches_into_the_next(path: Path) -> None:
    entry = directory_entry(path.read_bytes(), b"x/data/0")
    patch(path, entry + PACKED, struct.pack("<2L", 400, 400))
    refused(path, "entries overlap")


def local_header(path: Path, key: bytes) -> int:
    """Where the local header of a storage lies."""
    data = path.read_bytes()
    (local,) = struct.unpack_from("<L", data, directory_entry(data, b"x/data/" + key) + PLACE)
    return int(local)


def check(path: Path, tensor: TensorSlice) -> None:
    """Look at a tensor's local header, as who reads it does."""
    read = path.read_bytes()[tensor.offset - tensor.header_bytes : tensor.offset]
    check_header(tensor, memoryview(read), len(read))


def test_a_local_header_that_lies_is_found_when_the_tensor_is_read(path: Path) -> None:
    header = local_header(path, b"0")
    tensor = read_torch(path)["a"]
    assert tensor.header_bytes == tensor.offset - header > 0
    check(path, tensor)
    patch(path, header + 28, struct.pack("<H", 0xFFFF))
    assert read_torch(path)["a"] == tensor
    with pytest.raises(CorruptCheckpointError, match="not where its directory says"):
        check(path, tensor)


@pytest.mark.parametrize(
    ("at", "lie", "message"), [(28, b"\xff\xff", "entries overlap"), (30, b"x/data/7", "not where its directory says")]
)
def test_a_local_header_that_nobody_looks_at_later(path: Path, at: int, lie: bytes, message: str) -> None:
    storage = torch.arange(8.0)
    torch.save({"a": storage[:4], "b": storage[4:]}, path)
    found = read_torch(path)
    assert (found["a"].header_bytes > 0, found["b"].header_bytes) == (True, 0)
    assert found["a"].crc is found["b"].crc is None
    patch(path, local_header(path, b"0") + at, lie)
    refused(path, message)


def test_checksums_are_of_whole_storages(path: Path) -> None:
    data = path.read_bytes()
    for tensor in read_torch(path).values():
        assert tensor.crc == zlib.crc32(data[tensor.offset : tensor.offset + tensor.nbytes])
    at = directory_entry(data, b"x/data/0") + 16
    patch(path, at, bytes(4))
    assert read_torch(path)["a"].crc is None


@pytest.mark.parametrize(("alignment", "has_header"), [(128, True), (4096, True), (8192, False)])
def test_other_alignments(tmp_path: Path, alignment: int, has_header: bool) -> None:
    path = tmp_path / "x.bin"
    weights = {f"w{i}": torch.full((100 + i,), float(i)) for i in range(9)}
    with config.patch({"save.storage_alignment": alignment}):
        torch.save(weights, path)
    data = path.read_bytes()
    for name, tensor in read_torch(path).items():
        assert tensor.offset % alignment == 0
        assert data[tensor.offset : tensor.offset + tensor.nbytes] == weights[name].numpy().tobytes()
        assert (tensor.header_bytes > 0) == (
            has_header or tensor.offset - local_header(path, name[1:].encode()) <= 4096
        )


@pytest.mark.parametrize("alignment", [b"", b"0", b"-1", b"63", b"8388608", b"\xff", b"9" * 400])
def test_an_alignment_that_makes_no_sense(tmp_path: Path, alignment: bytes) -> None:
    torch.save({"a": torch.arange(8.0), "b": torch.arange(8.0) + 8}, tmp_path / "x.bin")
    with zipfile.ZipFile(tmp_path / "x.bin") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "y.bin", "w") as archive:
        for name, data in (entries | {"x/.storage_alignment": alignment}).items():
            archive.writestr(name, data)
    data = (tmp_path / "y.bin").read_bytes()
    for tensor, first in zip(read_torch(tmp_path / "y.bin").values(), (0.0, 8.0), strict=True):
        assert struct.unpack_from("<f", data, tensor.offset) == (first,)


def test_two_entries_of_one_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/data/0", b"a")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("x/data/0", b"b")
    refused(tmp_path / "x.bin", "one name")


@pytest.mark.parametrize("names", [(), ("x/y/data.pkl",), ("x/data.pkl", "y/data.pkl"), ("data.pkl",)])
def test_not_one_pickle(tmp_path: Path, names: tuple[str, ...]) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        for name in ("x/z", *names):
            archive.writestr(name, b"\x80\x02}.")
    refused(tmp_path / "x.bin", "not one that torch wrote")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (COUNT, b"\x00\x00"), (COUNT, b"\xff\x00"), (COMMENT, b"\x01\x00"),
        (DIRECTORY_BYTES, b"\x00" * 4), (DIRECTORY_BYTES, b"\xff\xff\xff\x7f"), (DIRECTORY_BYTES, b"\xff" * 4),
        (DIRECTORY, b"\x00" * 4), (DIRECTORY, b"\xff\xff\xff\x7f"),
    ],
)  # fmt: skip
def test_an_end_record_that_lies(path: Path, field: int, value: bytes) -> None:
    # Written again: torch's end record counts for nothing, for there is another one of 64 bits.
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    assert set(read_torch(path)) == {"a", "b"}
    patch(path, path.stat().st_size - 22 + field, value)
    refused(path, r"zip directory|truncated|data\.pkl")


@pytest.mark.parametrize("comment", [b"more", b"PK\x05\x06", b"PK\x05\x06" + bytes(18), bytes(70_000)])
def test_what_follows_the_end_record(path: Path, comment: bytes) -> None:
    with path.open("ab") as file:
        file.write(comment)
    refused(path, r"zip directory|data\.pkl")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (PLACE, b"\xff\xff\xff\xfe"), (PLACE, b"\xff" * 4), (SIZE, b"\xff" * 4), (SIZE, b"\x01\x00\x00\x00"),
        (NAME_BYTES, b"\xff\xff"), (METHOD, b"\x08\x00"), (0, b"PK\x01\x03"),
    ],
)  # fmt: skip
def test_an_entry_that_lies(path: Path, field: int, value: bytes) -> None:
    patch(path, directory_entry(path.read_bytes(), b"x/data/1") + field, value)
    refused(path, "zip directory|truncated|compressed|overlap|not where")


@pytest.mark.parametrize("size", [9 << 20, 20 << 30])
def test_a_directory_without_end(tmp_path: Path, size: int) -> None:
    """It is of holes: reading it would show nothing but zeros, for ever."""
    path = tmp_path / "x.bin"
    with path.open("wb") as file:
        file.write(b"PK\x03\x04")
        file.seek(4 + size)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, size, 4))
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, 4 + size, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))
    refused(path, f"its zip directory would have {size} bytes")


def test_a_byte_order_without_end(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/byteorder", b"\x1b" * 5000)
    refused(path, "byteorder would have 5000 bytes")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/byteorder", b"\x1b[31m")
    refused(path, r"stored in '\\x1b\[31m' byte order")
