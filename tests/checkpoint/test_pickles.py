"""Torch files made by hand: damaged ones, odd ones and malicious ones."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from switchrun.errors import CorruptCheckpointError
from tests.support.edits import Evil
from tests.support.headers import read_torch


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


@pytest.mark.parametrize(
    "program",
    [
        b"}N" + b"\x85" * 300_000 + b"K\x01s.",  # nested tuples as a key: endless to hash, and deep
        b"}N\x85" + b"2\x86" * 60 + b"K\x01s.",
        b"}Nq\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"K\x01s.",
        b"}Nq\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"\x85\x91K\x01s.",
        b"(N" + b"\x85" * 300_000 + b"\x91.",
        b"\x8f(N" + b"\x85" * 300_000 + b"\x90.",
        b"Nq\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"Q.",  # as a persistent id: endless to print
        b"N" + b"\x85" * 300_000 + b"Q.",
        b"X\x07\x00\x00\x00storagectorch\nFloatStorage\nK\x00X\x03\x00\x00\x00cpuK\x04tQ.",
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu\x8a\x04\xff\xff\xff\xfftQ.",
        b"(X\x07\x00\x00\x00storageccollections\nOrderedDict\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ.",
        b"(X\x05\x00\x00\x00otherctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ.",
        b"P0\n.",
        b"(" * 300_000 + b".",
        b"]" + b"]a" * 300_000 + b".",
        b"}" + b"X\x01\x00\x00\x00a}" * 100_000 + b"s" * 100_000 + b".",
        b"K\x01K\x02s.",
        b"}K\x01K\x02K\x03(u.",
        b"}(K\x01u.",
        b"}K\x01a.",
        b"s.", b"t.", b"\x87.", b"0.", b"R.", b"h\x07.", b"Q.", b"b.", b"u.", b".",
        b"NNR.", b"NN\x81.", b"K\x01)R.", b"ctorch\nSize\n)R.", b"ctorch\nSize\nNR.", b"ctorch\nSize\n(NtK\x01\x86R.",
        b"ctorch\nFloatStorage\n)R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.",
        b"ctorch._tensor\n_rebuild_from_type_v2\n)R.",
        (b"ctorch._tensor\n_rebuild_from_type_v2\n" * 2) + b"NNN\x87NtR.",
        b"NN\x93.", b"K\x01K\x02\x93.", b"X\x01\x00\x00\x00a)\x93.",
        b"\x82\x01.", b"\x83\x01\x00.", b"\x84\x01\x00\x00\x00.",  # extension codes
        b"\x8b\xff\xff\xff\x7f.", b"\x8b\x00\x00\x00\x04" + bytes(1 << 20),
        b"\x8a\xff.", b"\x8d" + b"\xff" * 8 + b".", b"\x8e" + b"\xff" * 8 + b".", b"X\xff\xff\xff\xffa.",
        b"X\x01\x00\x00\x00\xff.", b"X\x03\x00\x00\x00\xed\xa0\x80.",
        b"I" + b"9" * 100_000 + b"\n.", b"L" + b"9" * 100_000 + b"L\n.", b"F1e999\n.", b"S'a'\n.", b"V\\ud800\n.",
        b"cos", b"c\n\n.", b"c\xff\nx\n.",
        b"N" + b"2" * 300_000 + b".",
    ],
)  # fmt: skip
def test_no_program_does_more_than_describe_tensors(tmp_path: Path, program: bytes) -> None:
    path = torch_zip(tmp_path / "x.bin", b"\x80\x02" + program)
    with pytest.raises(CorruptCheckpointError, match=r"damaged|no named tensors|asks to run") as caught:
        read_torch(path)
    assert caught.value.message.isprintable()


def attributes(state: bytes) -> bytes:
    """The pickle of an OrderedDict with one tensor whose attributes are set."""
    return b"\x80\x02ccollections\nOrderedDict\n)R" + reference()[3:-2] + b"s" + state + b"b."


@pytest.mark.parametrize(
    "state", [b"}", b"N", b"}X\x05\x00\x00\x00itemsNs", b"}X\x09\x00\x00\x00__class__Ns", b"NN\x86", b"K\x01"]
)
def test_attributes_of_dictionaries_are_of_no_interest(tmp_path: Path, state: bytes) -> None:
    path = torch_zip(tmp_path / "x.bin", attributes(state), **{"data/0": bytes(16)})
    assert list(read_torch(path)) == ["w"]


@pytest.mark.parametrize("steps", [b"N0" * 3_000_000, b"}" * 6_000_000])
def test_a_program_that_takes_too_long(tmp_path: Path, steps: bytes) -> None:
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        read_torch(torch_zip(tmp_path / "x.bin", b"\x80\x02" + steps + b"."))


def test_a_program_that_is_too_long(tmp_path: Path) -> None:
    path = torch_zip(tmp_path / "x.bin", b"\x80\x02}")
    data = bytearray(path.read_bytes())
    # 1 TiB by the zip64 fields, in a hole.
    central = data.index(b"PK\x01\x02")
    extra = struct.pack("<2HQQ", 1, 16, 1 << 40, 1 << 40)
    name = bytes(data[central + 46 : central + 46 + 10])
    entry = (
        data[central : central + 20]
        + b"\xff" * 8
        + struct.pack("<2H", len(name), len(extra))
        + data[central + 32 : central + 46]
    )
    directory = bytes(entry) + name + extra
    with path.open("r+b") as file:
        file.truncate(2 << 40)
        file.seek(2 << 40)
        file.write(directory)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, len(directory), 2 << 40))
        file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, (2 << 40) + len(directory), 1))
        file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(directory), 0xFFFFFFFF, 0))
    with pytest.raises(CorruptCheckpointError, match=f"data.pkl would have {1 << 40} bytes"):
        read_torch(path)


def accepted() -> dict[str, object]:
    """What weights_only takes beside plain tensors, as training leaves it."""
    marked = torch.ones(2)
    marked.note = "a"  # type: ignore[attr-defined]
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    return {
        "an OrderedDict with attributes": module.state_dict(),
        "parameters": dict(module.named_parameters()),
        "tensors with attributes": {"w": marked, "p": torch.nn.Parameter(torch.ones(2))},
        "other dtypes": {str(d): torch.zeros(2, dtype=d) for d in (torch.uint16, torch.float8_e5m2, torch.complex64)},
        "other keys": {"w": torch.ones(2), 3: torch.ones(1), (1, 2): torch.ones(1), None: 1, 2.5: 1, True: 1},
        "other values": {
            "w": torch.ones(2), "lr": 1e-3, "seed": 1 << 200, "none": None, "yes": True, "sizes": torch.Size([1, 2]),
            "device": torch.device("cpu"), "dtype": torch.bfloat16, "counter": Counter([1, 1]), "set": {1},
            "bytes": b"a", "array": bytearray(b"a"), "complex": 1j, "list": [1, [2], (3,)], "text": "é\n" * 300,
            "layout": torch.strided, "meta": torch.empty(2, device="meta"),
        },
        "nested": {
            "model": {"w": torch.ones(2)},
            "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "groups": [{"params": [0]}]},
        },
    }  # fmt: skip


@pytest.mark.parametrize("name", accepted())
def test_what_weights_only_takes_is_taken(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.bin"
    torch.save(accepted()[name], path)
    loaded: Any = torch.load(path, weights_only=True)
    tensors = loaded.get("model", loaded)
    expected = {
        k: t for k, t in tensors.items() if type(k) is str and isinstance(t, torch.Tensor) and t.device.type == "cpu"
    }
    found = read_torch(path)
    content = path.read_bytes()
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        stored = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[found[key].offset :][: found[key].nbytes] == stored
        assert found[key].shape == tuple(tensor.shape)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_protocols(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(2), "x" * 300: torch.ones(3), "s": {1}}, path, pickle_protocol=protocol)
    assert {name: tensor.shape for name, tensor in read_torch(path).items()} == {"w": (2,), "x" * 300: (3,)}


@pytest.mark.parametrize(("of", "numel"), [(b"HalfStorage", 4), (b"FloatStorage", 3)])
def test_one_storage_in_two_ways_is_refused(tmp_path: Path, of: bytes, numel: int) -> None:
    """Torch goes by the first."""
    other = reference(numel=numel).replace(b"FloatStorage", of).replace(b"K\x04\x85", b"K\x02\x85")
    program = reference()[:-2] + b"s" + other[3:].replace(b"\x00w", b"\x00x")
    path = torch_zip(tmp_path / "x.bin", program, **{"data/0": bytes(16)})
    with pytest.raises(CorruptCheckpointError, match="one storage in two ways"):
        read_torch(path)


def test_a_negated_tensor_is_refused(tmp_path: Path) -> None:
    """Its bytes are not its values."""
    path = tmp_path / "x.bin"
    torch.save({"w": torch.ones(2, dtype=torch.complex64).conj().imag}, path)
    assert torch.load(path, weights_only=True)["w"].is_neg()
    with pytest.raises(CorruptCheckpointError, match="negated"):
        read_torch(path)


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
