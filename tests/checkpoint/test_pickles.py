"""Torch files made by hand: damaged ones, odd ones and malicious ones."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from switchrun.checkpoint.torch_file import read_torch
from switchrun.errors import CorruptCheckpointError
from tests.support.edits import Evil


def test_strides_that_are_no_range(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"fine": torch.ones(2), "comb": torch.randn(4, 6)[:, ::2]}, path)
    with pytest.raises(CorruptCheckpointError, match=r"tensor comb \[4, 3\] is stored with strides \[6, 2\]"):
        read_torch(path)


def torch_zip(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x/data.pkl", pickled)
        for name, data in entries.items():
            archive.writestr(f"x/{name}", data)
    return path


def reference(key: bytes = b"0", numel: int = 4, args: bytes = b"K\x00K\x04\x85K\x01\x85") -> bytes:
    """The pickle of {"w": tensor of four floats}, by hand."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00" + key
    storage += b"X\x03\x00\x00\x00cpuK" + bytes([numel]) + b"tQ"
    empty = b"ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + args + b"\x89" + empty + b"tR"
    return b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"s."


def test_pickle_by_hand(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("x/data.pkl", reference())
        archive.writestr("x/data/0", bytes(16))
    assert read_torch(tmp_path / "x.bin")["w"].nbytes == 16


@pytest.mark.parametrize(
    ("pickled", "entries", "message"),
    [
        (reference(), {}, "lacks its entry data/0"),
        (reference(), {"data/0": bytes(8)}, "w needs 16 bytes of a storage that has 8"),
        (reference(args=b"K\x02K\x04\x85K\x01\x85"), {"data/0": bytes(16)}, "w needs 24 bytes"),
        (reference(args=b"K\x00X\x01\x00\x00\x00a\x85K\x01\x85"), {"data/0": bytes(16)}, "damaged"),
        (reference(args=b"K\x00K\x04\x85)"), {"data/0": bytes(16)}, "damaged"),
        (reference()[:-9], {}, "damaged"),
        (b"", {}, "damaged"),
        (b"garbage", {}, "damaged"),
        (b"\x80\x02r\xff\xff\xff\x7f.", {}, "damaged"),
        # A memo index that makes the unpickler written in C take 64 GiB.
        (b"\x80\x02Nr\xff\xff\xff\xff.", {}, "no named tensors"),
        (pickle.dumps([1, 2]), {}, "no named tensors"),
        (pickle.dumps({"a": 1}), {}, "no named tensors"),
        (reference(), {"data/0": bytes(16), "byteorder": b"big"}, "'big' byte order"),
    ],
)
def test_damaged_torch_files(tmp_path: Path, pickled: bytes, entries: dict[str, bytes], message: str) -> None:
    path = torch_zip(tmp_path / "x.bin", pickled, **entries)
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        read_torch(path)
    assert str(path) in caught.value.message


def test_compressed_archive(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "x.bin", reference(), zipfile.ZIP_DEFLATED, **{"data/0": bytes(16)})
    with pytest.raises(CorruptCheckpointError, match="compressed"):
        read_torch(path)


def test_some_other_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CorruptCheckpointError, match="not one that torch wrote"):
        read_torch(tmp_path / "x.bin")


def test_directory_that_lies_about_places(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(4)}, path)
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    data[central + 42 : central + 46] = struct.pack("<I", 7)
    path.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"not where its directory says|truncated"):
        read_torch(path)


def test_malicious_pickle_does_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "x.bin", tmp_path / "pwned"
    torch.save({"w": torch.ones(2), "x": Evil(marker)}, path)
    with pytest.raises(CorruptCheckpointError, match=r"asks to run `.*` and was not loaded"):
        read_torch(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the file is not malicious, so that the test shows nothing"


@pytest.mark.parametrize(
    ("module", "name"),
    [("os", "system"), ("builtins", "eval"), ("torch", "load"), ("torch.storage", "_load_from_bytes"),
     ("functools", "partial"), ("collections", "OrderedDict.fromkeys"), ("\x1b[2J", "x")],
)  # fmt: skip
@pytest.mark.parametrize("opcode", ["global", "stack", "inst"])
def test_nothing_but_weights_is_found(tmp_path: Path, module: str, name: str, opcode: str) -> None:
    def text(value: str) -> bytes:
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    programs = {
        "global": b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"(tR.",
        "stack": b"\x80\x04" + text(module) + text(name) + b"\x93)R.",
        "inst": b"(i" + f"{module}\n{name}\n".encode() + b".",
    }
    path = torch_zip(tmp_path / "x.bin", programs[opcode])
    with pytest.raises(CorruptCheckpointError, match="asks to run `") as caught:
        read_torch(path)
    assert "\x1b" not in caught.value.message


@pytest.mark.parametrize(
    "known", ["torch._utils\n_rebuild_tensor_v2", "torch\nFloatStorage", "torch\nSize", "collections\nOrderedDict"]
)
@pytest.mark.parametrize("state", [b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x08\x00\x00\x00__call__K\x01s\x86"])
def test_stand_ins_cannot_be_changed(tmp_path: Path, known: str, state: bytes) -> None:
    # BUILD sets attributes of whatever the pickle holds, and these live as long as the process does.
    path = torch_zip(tmp_path / "x.bin", b"\x80\x02c" + known.encode() + b"\n" + state + b"b.")
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        read_torch(path)
