"""Both containers, against the libraries that own them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from switchrun.errors import CorruptCheckpointError, SwitchrunError
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config
from tests.support.headers import read_safetensors, read_torch


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "f32": torch.randn(3, 5),
        "f16": torch.randn(7).half(),
        "bf16": torch.randn(2, 3, 4).bfloat16(),
        "i64": torch.arange(6),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }


def raw(path: Path, offset: int, nbytes: int) -> bytes:
    return path.read_bytes()[offset : offset + nbytes]


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_safetensors_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(some_tensors(), path, metadata={"format": "pt"})
    entries = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        assert set(entries) == set(file.keys())
        for name, entry in entries.items():
            tensor = file.get_tensor(name)
            assert (entry.shape, entry.transposed) == (tuple(tensor.shape), False)
            assert raw(path, entry.offset, entry.nbytes) == as_bytes(tensor)
    assert [entries[name].dtype for name in ("f32", "f16", "bf16", "i64")] == ["F32", "F16", "BF16", "I64"]


def test_torch_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    tensors: dict[str, Any] = some_tensors()
    tensors |= {
        "view": tensors["f32"][1:],
        "alias": tensors["f32"],
        "column": torch.randn(4, 9)[:, :1],
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "transposed": torch.randn(5, 3).t(),
    }
    # One column of nine is not dense; of a matrix with a single row it is.
    tensors["column"] = torch.randn(1, 9)[:, 4:5]
    torch.save({**tensors, "epoch": 3, "dtype": torch.float32, "size": torch.Size([1])}, path)
    entries = read_torch(path)
    loaded = torch.load(path, weights_only=True)
    with FakeTensorMode():
        fake = torch.load(path, weights_only=True)
    assert set(entries) == set(tensors)
    for name, entry in entries.items():
        tensor = loaded[name].detach()
        stored = tensor.t() if entry.transposed else tensor
        assert entry.shape == tuple(tensor.shape)
        assert raw(path, entry.offset, entry.nbytes) == as_bytes(stored)
        if entry.nbytes:
            start = fake[name].untyped_storage()._checkpoint_offset
            assert entry.offset == start + fake[name].storage_offset() * fake[name].element_size()
    assert [name for name, entry in entries.items() if entry.transposed] == ["transposed"]


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_may_be_nested_once(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.pt"
    torch.save({key: {"w": torch.ones(2)}, "step": 1}, path)
    assert read_torch(path)["w"].shape == (2,)


def test_fake_tensors_saved_without_data(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with FakeTensorMode():
        tensors = {"a": torch.empty(1000, 30), "b": torch.empty(5, dtype=torch.bfloat16)}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tensors, path)
    entries = read_torch(path)
    assert entries["a"].nbytes == 120_000
    assert entries["b"].dtype == "BF16"


@pytest.mark.parametrize("cut", [0, 5, 60, -1])
def test_truncated_safetensors(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file(some_tensors(), path)
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with pytest.raises(CorruptCheckpointError, match=r"truncated|empty") as caught:
        read_safetensors(path)
    assert str(path) in caught.value.message


def safetensors_bytes(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(64)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xff\xfe", "header is not valid: 'utf-8'"),
        (b"[" * 200_000, "nested too deeply"),
        ([1], "not a JSON object"),
        ({"w": 3}, "tensor w is malformed"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "tensor w is malformed"),
        ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "a number is negative"),
        ({"w": {"dtype": "F32", "shape": [10**4000] * 3, "data_offsets": [0, 8]}}, "tensor w is malformed"),
        ({"w": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}, "tensor w is malformed"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, "tensor w is malformed"),
        ({"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}, "tensor w is malformed"),
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, r"w has 8 bytes, but F32 \[3\] takes 12"),
        ({"w": {"dtype": "F32", "shape": [99], "data_offsets": [0, 396]}}, "truncated: tensor w ends at byte"),
    ],
)
def test_damaged_safetensors_headers(tmp_path: Path, header: object, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors_bytes(header))
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        read_safetensors(path)
    assert str(path) in caught.value.message


def test_not_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" * 4)
    with pytest.raises(CorruptCheckpointError, match="not a safetensors file"):
        read_safetensors(path)


@pytest.mark.parametrize("read", [read_safetensors, read_torch])
def test_git_lfs_pointer(tmp_path: Path, read: Any) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CorruptCheckpointError, match="Git LFS pointer") as caught:
        read(path)
    assert "git lfs pull" in caught.value.hint


@pytest.mark.parametrize("read", [read_safetensors, read_torch])
def test_what_the_system_says(tmp_path: Path, read: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match="it is a folder, not a file"):
        read(tmp_path)
    with pytest.raises(CorruptCheckpointError, match="No such file"):
        read(tmp_path / "none")


@pytest.mark.parametrize("cut", [3, 100, 700, -1, -30])
def test_truncated_torch_file(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.bin"
    torch.save(some_tensors(), path)
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    with pytest.raises(CorruptCheckpointError, match=r"truncated|not a torch file") as caught:
        read_torch(path)
    assert str(path) in caught.value.message


def test_old_torch_format(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save(some_tensors(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(CorruptCheckpointError, match="old format") as caught:
        read_torch(path)
    assert "torch.save(torch.load(path, weights_only=True), path)" in caught.value.hint


def test_not_a_torch_file(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"hello, world")
    with pytest.raises(CorruptCheckpointError, match="not a torch file"):
        read_torch(path)


def test_files_of_more_than_4_gib(tmp_path: Path) -> None:
    # Holes, so it takes no space: what matters is the zip64 directory.
    path = tmp_path / "x.bin"
    with FakeTensorMode():
        tensors = {name: torch.empty(1_200_000_000, dtype=torch.bfloat16) for name in "abc"}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(tensors, path)
    with FakeTensorMode():
        fake = torch.load(path, weights_only=True)
    entries = read_torch(path)
    assert entries["c"].offset > 1 << 32
    assert {name: entry.offset for name, entry in entries.items()} == {
        name: tensor.untyped_storage()._checkpoint_offset for name, tensor in fake.items()
    }


@settings(max_examples=150, deadline=None)
@given(data=st.data(), container=st.sampled_from(["safetensors", "torch"]))
def test_damage_anywhere_is_an_error_of_ours(data: st.DataObject, container: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        if container == "safetensors":
            save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
        else:
            torch.save({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            entries = read_safetensors(path) if container == "safetensors" else read_torch(path)
        except SwitchrunError:
            return
        assert all(entry.offset + entry.nbytes <= len(content) for entry in entries.values())


def test_a_real_model_in_both_containers(tmp_path: Path) -> None:
    model = random_model(tiny_config())
    first = read_safetensors(save_checkpoint(model, tmp_path / "a") / "model.safetensors")
    second = read_torch(save_checkpoint(model, tmp_path / "b", container="torch") / "pytorch_model.bin")
    assert {name: (e.dtype, e.shape, e.nbytes) for name, e in first.items()} == {
        name: (e.dtype, e.shape, e.nbytes) for name, e in second.items() if name in first
    }
