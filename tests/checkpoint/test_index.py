"""The index: which files are read, what is remembered, and what is wrong with a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from switchrun.checkpoint import index as index_module
from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.files import Weights
from switchrun.checkpoint.index import load_index
from switchrun.errors import CorruptCheckpointError, ModelError
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the weights files whose headers were parsed."""
    names: list[str] = []
    for name in ("read_safetensors", "read_torch"):
        read = getattr(index_module, name)

        def counting(file: Weights, turn: Lock, read=read):  # type: ignore[no-untyped-def]
            names.append(file.place.name)
            return read(file, turn)

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


def forge(record: dict[str, Any], path: Path) -> None:
    from switchrun.checkpoint.index import _checksum

    text = json.dumps(record).encode()
    path.write_bytes(_checksum(text) + b"\n" + text)


HUGE = 1 << 70


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.clear(),
        lambda r: r.update(version="2"),
        lambda r: r.update(stamps=[]),
        lambda r: r["stamps"].pop(),
        lambda r: r["stamps"][0].append(1),
        lambda r: r["stamps"].append(["../x", 1, 1]),
        lambda r: r.update(files=["../m/model.safetensors"]),
        lambda r: r.update(files=["/etc/passwd"]),
        lambda r: r.update(files=[["model.safetensors"]]),
        lambda r: r.update(files=None),
        lambda r: r.update(files=["model.safetensors"] * 2),
        lambda r: r["offset"].__setitem__(0, HUGE),
        lambda r: r["offset"].__setitem__(0, -1),
        lambda r: r["offset"].__setitem__(0, 0.0),
        lambda r: r["offset"].__setitem__(0, True),
        lambda r: r["offset"].__setitem__(0, None),
        lambda r: r["offset"].__setitem__(0, r["stamps"][1][1]),
        lambda r: r.update(file=[1] * len(r["name"])),
        lambda r: r.update(file=[-1] * len(r["name"])),
        lambda r: r["kind"].__setitem__(0, len(r["kinds"])),
        lambda r: r["kind"].__setitem__(0, -1),
        lambda r: r["kind"].__setitem__(0, "0"),
        lambda r: r["name"].__setitem__(0, 3),
        lambda r: r["name"].__setitem__(0, ["w"]),
        lambda r: r["name"].__setitem__(0, None),
        lambda r: r.update(name=[], file=[], kind=[]),
        lambda r: r.update(name=[], file=[], kind=[], offset=[]),
        lambda r: r["kinds"][0].__setitem__(0, r["kinds"][0][0] - 1),
        lambda r: r["kinds"][0].__setitem__(0, HUGE),
        lambda r: r["kinds"][0].__setitem__(1, "F8"),
        lambda r: r["kinds"][0].__setitem__(1, ["F32"]),
        lambda r: r["kinds"][0].__setitem__(2, [-1, -128 * 16]),
        lambda r: r["kinds"][0].__setitem__(2, [HUGE, 0]),
        lambda r: r["kinds"][0].__setitem__(2, 3),
        lambda r: r["kinds"][0].__setitem__(3, 1),
        lambda r: r["kinds"].append([4, "F32", [1], True]),
        lambda r: r["kinds"].append([]),
        lambda r: r.update(kinds={"a": 1}),
        lambda r: r.update(lost=[]),
        lambda r: r.update(lost={"w": 3}),
        lambda r: r.update(place="/etc"),
        lambda r: r.update(crc=[0]),
        lambda r: r.update(crc=[-1] * len(r["name"])),
        lambda r: r.update(crc=[1 << 32] * len(r["name"])),
        lambda r: r.update(crc=[1.0] * len(r["name"])),
        lambda r: r.update(crc=[None] * len(r["name"])),
        lambda r: r.update(header_bytes=[-1] * len(r["name"])),
        lambda r: r.update(header_bytes=[4097] * len(r["name"])),
        lambda r: r.update(header_bytes=["1"] * len(r["name"])),
        lambda r: r.update(entry="../model.safetensors"),
    ],
)
def test_a_forged_cache_counts_as_absent(tmp_path: Path, reads: list[str], change: Any) -> None:
    folder = save(tmp_path / "m")
    expected = dict(load_index(folder, tmp_path / "c"))
    (cache,) = (tmp_path / "c").iterdir()
    record = json.loads(cache.read_bytes().split(b"\n", 1)[1])
    change(record)
    forge(record, cache)
    reads.clear()
    assert dict(load_index(folder, tmp_path / "c")) == expected
    assert reads


def test_only_what_was_changed_makes_a_forged_cache_absent(tmp_path: Path, reads: list[str]) -> None:
    """Else the test above would show nothing."""
    folder = save(tmp_path / "m")
    load_index(folder, tmp_path / "c")
    (cache,) = (tmp_path / "c").iterdir()
    forge(json.loads(cache.read_bytes().split(b"\n", 1)[1]), cache)
    reads.clear()
    assert load_index(folder, tmp_path / "c")
    assert not reads


@pytest.mark.parametrize("kind", ["fifo", "device", "sparse", "loop", "deep"])
def test_a_cache_that_is_no_such_file(tmp_path: Path, reads: list[str], kind: str) -> None:
    folder = save(tmp_path / "m")
    expected = dict(load_index(folder, tmp_path / "c"))
    (cache,) = (tmp_path / "c").iterdir()
    cache.unlink()
    if kind == "deep":
        from switchrun.checkpoint.index import _checksum

        text = b"[" * 200_000
        cache.write_bytes(_checksum(text) + b"\n" + text)
    else:
        no_file(cache, kind)
    reads.clear()
    assert dict(load_index(folder, tmp_path / "c")) == expected
    assert reads


def no_file(path: Path, kind: str) -> None:
    """Put something in a file's place that cannot be read, or has no end."""
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    else:
        with path.open("ab") as file:
            file.truncate(20 << 30)


@pytest.mark.parametrize("name", ["config.json", SAFE_INDEX, "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "device", "sparse", "loop"])
def test_files_that_are_none_or_never_end(tmp_path: Path, name: str, kind: str) -> None:
    folder = save(tmp_path / "m", sharded=True)
    (folder / name).unlink()
    no_file(folder / name, kind)
    with pytest.raises(CorruptCheckpointError) as caught:
        open_checkpoint(str(folder))
    assert name in caught.value.message


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


def test_an_index_that_names_what_no_shard_holds(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", sharded=True)
    expected = dict(open_checkpoint(str(folder)).dense)
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight", "encoder.block.7.x.weight")
    rewrite_index(folder, dict.fromkeys(names, "model-00001-of-00003.safetensors"))
    for _ in range(2):  # read, then taken from the cache
        assert set(load_index(folder).lost) == set(names)
    assert open_checkpoint(str(folder)).dense == expected


def test_a_tensor_that_is_needed_and_not_where_the_index_says(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", sharded=True)
    name, file = "encoder.final_layer_norm.weight", "model-00001-of-00003.safetensors"
    tensors = load_file(folder / file)
    del tensors[name]
    save_file(tensors, folder / file)
    for _ in range(2):
        with pytest.raises(
            CorruptCheckpointError, match=f"tensor {name} is not in this file, but the index says so"
        ) as e:
            open_checkpoint(str(folder))
        assert str(folder / file) in e.value.message


def test_an_index_that_leaves_out_what_its_shards_hold(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", sharded=True)
    expected = dict(load_index(folder))
    path = folder / "model.safetensors.index.json"
    record = json.loads(path.read_text())
    some = {record["weight_map"][name]: name for name in reversed(record["weight_map"])}
    path.write_text(json.dumps(record | {"weight_map": {name: file for file, name in some.items()}}))
    assert dict(load_index(folder)) == expected


def make_folder(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    if weight_map:
        record = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("weight_map", "taken"),
    [
        ({"w": "a.safetensors", "x": "b.safetensors"}, "a.safetensors"),
        ({"w": "b.safetensors", "x": "a.safetensors"}, "b.safetensors"),
        # transformers reads the files in the order of their names, and the last one stays.
        ({"x": "a.safetensors", "y": "b.safetensors"}, "b.safetensors"),
        ({"y": "b.safetensors", "x": "a.safetensors", "w": "c.safetensors"}, "b.safetensors"),
    ],
)
def test_a_tensor_that_two_shards_hold(tmp_path: Path, weight_map: dict[str, str], taken: str) -> None:
    folder = make_folder(tmp_path / "m", weight_map)
    for name in "abc":
        held = {"w": torch.ones(2)} if name != "c" else {"z": torch.ones(3)}
        save_file(held, folder / f"{name}.safetensors")
    assert load_index(folder)["w"].file == folder / taken


def save_torch(tensors: dict[str, torch.Tensor], path: Path) -> None:
    torch.save(tensors, path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "weights.pt"])
@pytest.mark.parametrize("write", [save_file, save_torch])
def test_a_file_is_read_by_what_it_is(tmp_path: Path, name: str, write: Any) -> None:
    folder = make_folder(tmp_path / "m")
    write({"w": torch.ones(2, 3)}, folder / name)
    assert load_index(folder)["w"].shape == (2, 3)


def test_shards_of_both_containers(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"a": "a.safetensors", "b": "b.bin"})
    save_file({"a": torch.ones(2)}, folder / "a.safetensors")
    torch.save({"b": torch.ones(3)}, folder / "b.bin")
    assert {name: tensor.shape for name, tensor in load_index(folder).items()} == {"a": (2,), "b": (3,)}


@pytest.mark.parametrize("there", [(SAFE, SAFE_INDEX), (SAFE_INDEX, BIN), (BIN, BIN_INDEX), (SAFE, BIN), (BIN_INDEX,)])
@pytest.mark.parametrize("folder_first", [False, True])
def test_which_file_is_taken_if_there_are_several(tmp_path: Path, there: tuple[str, ...], folder_first: bool) -> None:
    """The order is transformers'; a folder of that name is passed over."""
    folder = make_folder(tmp_path / "m")
    for number, name in enumerate(there):
        if name.endswith(".json"):
            shard = f"shard{number}{'.bin' if 'bin' in name else '.safetensors'}"
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {f"w{number}": shard}}))
            name = shard
        write = save_torch if name.endswith(".bin") else save_file
        write({f"w{number}": torch.ones(1)}, folder / name)
    taken = 0
    if folder_first and len(there) > 1:
        (folder / there[0]).unlink()
        (folder / there[0]).mkdir()
        taken = 1
    assert list(load_index(folder)) == [f"w{taken}"]


@pytest.mark.parametrize("name", ["other.safetensors", "deep/other.safetensors"])
def test_weights_that_the_configuration_names(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "deep").mkdir()
    (folder / "config.json").write_text(json.dumps({"transformers_weights": name}))
    save_file({"w": torch.ones(1)}, folder / SAFE)
    save_file({"x": torch.ones(1)}, folder / name)
    for _ in range(2):
        assert list(load_index(folder)) == ["x"]


@pytest.mark.parametrize("name", ["../other.safetensors", "/other.safetensors", "other.bin", "", 3, ["a.safetensors"]])
def test_weights_that_the_configuration_must_not_name(tmp_path: Path, name: object) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "config.json").write_text(json.dumps({"transformers_weights": name}))
    save_file({"w": torch.ones(1)}, folder / SAFE)
    with pytest.raises(ModelError, match=r"config\.json: transformers_weights"):
        load_index(folder)


@pytest.mark.parametrize(
    "path", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "x\0y", "", ".", "\ud800", "\x1b[31m/.."]
)
def test_an_index_that_leaves_its_folder(tmp_path: Path, path: str) -> None:
    folder = save(tmp_path / "m", sharded=True)
    rewrite_index(folder, {"w": path})
    with pytest.raises(CorruptCheckpointError, match="outside the checkpoint's folder") as caught:
        load_index(folder)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a JSON object was expected"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": {"w": 3}}', "malformed"),
        ('{"weight_map": {"w": null, "x": ["a"]}}', "malformed"),
        ('{"weight_map": {"w": {}}}', "malformed"),
        ('{"weight_map": ["a.safetensors"]}', "no weight_map"),
        ("\ufeff{}", "byte order mark"),
        ("[" * 100_000, "nested too deeply"),
        ('{"weight_map": {"w": ' + "9" * 5000 + "}}", "not valid JSON"),
        ('{"weight_map": [' + "{}," * 1_000_000 + "0]}", "more values than any model needs"),
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
