"""The index: which files are read, what is remembered, and what is wrong with a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from switchrun.checkpoint import index as index_module
from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.index import load_index
from switchrun.errors import CorruptCheckpointError, ModelError
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weights files whose headers were parsed."""
    names: list[str] = []
    for name in ("read_safetensors", "read_torch"):
        read = getattr(index_module, name)

        def counting(path: Path, read=read):  # type: ignore[no-untyped-def]
            names.append(path.name)
            return read(path)

        monkeypatch.setattr(index_module, name, counting)
    return names


def save(folder: Path, **options: object) -> Path:
    return save_checkpoint(random_model(tiny_config()), folder, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("container", ["safetensors", "torch"])
@pytest.mark.parametrize("sharded", [False, True])
def test_second_open_parses_nothing(tmp_path: Path, reads: list[str], container: str, sharded: bool) -> None:
    folder = save(tmp_path / "m", container=container, sharded=sharded)
    first = open_checkpoint(str(folder))
    assert reads
    reads.clear()
    second = open_checkpoint(str(folder))
    assert reads == []
    assert second.fingerprint == first.fingerprint
    assert second.dense == first.dense
    assert dict(second.experts) == dict(first.experts)


def test_the_cache_is_where_it_was_asked_for(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    load_index(folder, tmp_path / "here")
    assert [path.suffix for path in (tmp_path / "here").iterdir()] == [".json"]
    load_index(folder)
    assert len(list((Path(os.environ["SWITCHRUN_CACHE"]) / "index").iterdir())) == 1


def test_the_default_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWITCHRUN_CACHE")
    load_index(save(tmp_path / "m"))
    assert len(list((Path(os.environ["XDG_CACHE_HOME"]) / "switchrun" / "index").iterdir())) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors"])
def test_a_changed_file_is_noticed(tmp_path: Path, reads: list[str], name: str) -> None:
    folder = save(tmp_path / "m", sharded=True)
    before = open_checkpoint(str(folder)).fingerprint
    reads.clear()
    status = (folder / name).stat()
    os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert open_checkpoint(str(folder)).fingerprint != before
    assert len(reads) == 3


def test_another_container_is_noticed(tmp_path: Path, reads: list[str]) -> None:
    folder = save(tmp_path / "m", container="torch")
    load_index(folder)
    save(folder)
    reads.clear()
    load_index(folder)
    assert reads == ["model.safetensors"], "safetensors is preferred to torch"


def test_a_deleted_shard_is_noticed(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", sharded=True)
    load_index(folder)
    lost = folder / "model-00002-of-00003.safetensors"
    lost.unlink()
    with pytest.raises(CorruptCheckpointError, match="missing") as caught:
        load_index(folder)
    assert str(lost) in caught.value.message


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "version", "columns", "directory"])
def test_a_damaged_cache_counts_as_absent(tmp_path: Path, reads: list[str], damage: str) -> None:
    from switchrun.checkpoint.index import _checksum

    folder = save(tmp_path / "m")
    expected = dict(load_index(folder, tmp_path / "c"))
    (cache,) = (tmp_path / "c").iterdir()
    data = cache.read_bytes()
    record = json.loads(data.split(b"\n", 1)[1])
    if damage == "version":
        record["version"] = 0
    if damage == "columns":
        record["offset"].pop()
    text = json.dumps(record).encode()
    cache.unlink()
    if damage == "directory":
        cache.mkdir()
    else:
        flipped = data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
        signed = _checksum(text) + b"\n" + text
        cache.write_bytes({"empty": b"", "cut": data[:-9], "flipped": flipped}.get(damage, signed))
    reads.clear()
    assert dict(load_index(folder, tmp_path / "c")) == expected
    assert reads
    assert [p for p in (tmp_path / "c").iterdir() if p.suffix == ".tmp"] == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("a file, not a folder")
    assert load_index(save(tmp_path / "m"), tmp_path / "c")


def test_two_folders_with_one_name(tmp_path: Path) -> None:
    for number, experts in enumerate((2, 3)):
        folder = tmp_path / str(number) / "m"
        save_checkpoint(random_model(tiny_config(num_experts=experts)), folder)
        assert open_checkpoint(str(folder), cache_dir=tmp_path / "c").num_experts == experts


def rewrite_index(folder: Path, change: dict[str, object]) -> Path:
    path = folder / "model.safetensors.index.json"
    record = json.loads(path.read_text())
    record["weight_map"] |= change
    path.write_text(json.dumps(record))
    return path


def test_an_index_that_names_an_absent_tensor(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", sharded=True)
    file = "model-00001-of-00003.safetensors"
    rewrite_index(folder, {"encoder.block.7.x.weight": file})
    with pytest.raises(
        CorruptCheckpointError, match=r"tensor encoder\.block\.7\.x\.weight is not in this file"
    ) as caught:
        load_index(folder)
    assert str(folder / file) in caught.value.message


@pytest.mark.parametrize("path", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "x\0y", ""])
def test_an_index_that_leaves_its_folder(tmp_path: Path, path: str) -> None:
    folder = save(tmp_path / "m", sharded=True)
    rewrite_index(folder, {"w": path})
    with pytest.raises(CorruptCheckpointError, match="outside the checkpoint's folder"):
        load_index(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a JSON object was expected"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"w": 3}}', "malformed"),
    ],
)
def test_a_damaged_index(tmp_path: Path, text: str, message: str) -> None:
    folder = save(tmp_path / "m", sharded=True)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptCheckpointError, match=message):
        load_index(folder)


def test_an_index_with_an_impossible_name(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", sharded=True)
    rewrite_index(folder, {"w": "x" * 5000})
    with pytest.raises(CorruptCheckpointError, match="File name too long"):
        load_index(folder)


def test_shards_in_a_subfolder(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", sharded=True)
    (folder / "deep").mkdir()
    file = "model-00001-of-00003.safetensors"
    (folder / file).rename(folder / "deep" / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(file, f"deep/{file}"))
    assert open_checkpoint(str(folder)).dense["shared.weight"].file == (folder / "deep" / file).resolve()


def test_folders_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_index(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="there are no weights"):
        load_index(tmp_path)
    for name in ("a.pt", "b.pt", "optimizer.pt"):
        torch.save({"w": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ModelError, match=r"2 \.pt files and no index") as caught:
        load_index(tmp_path)
    assert "a.pt, b.pt" in caught.value.hint
    (tmp_path / "b.pt").unlink()
    assert list(load_index(tmp_path)) == ["w"]


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ModelError, match="Permission denied"):
        load_index(tmp_path)
