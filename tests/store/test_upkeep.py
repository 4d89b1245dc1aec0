"""Looking at stores, verifying and clearing them."""

from __future__ import annotations

import pytest

from switchrun.errors import CorruptCheckpointError
from switchrun.store import clear_store, list_stores, verify_store
from tests.store.conftest import LAYOUT, MODEL, data_of, flip, key, open_store

FILE_BYTES = 4096 + LAYOUT.nbytes


def test_all_stores_are_listed(offload):
    assert list_stores(offload) == []
    store = open_store(offload)
    for number in range(3):
        store.write(key(number, block=number), data_of(number))
    open_store(offload, dtype="nf4")
    damaged = open_store(offload, model="other")
    damaged.write(key(0), data_of(0))
    (damaged.folder / "manifest.json").write_text("{")
    (offload / "index").mkdir()
    (offload / "index" / "x.json").write_text("")
    found = {info.folder: info for info in list_stores(offload)}
    assert len(found) == 3
    info = found[store.folder]
    assert (info.manifest, info.experts, info.nbytes, info.problem) == (store.manifest, 3, 3 * FILE_BYTES, "")
    assert found[damaged.folder].manifest is None
    assert found[damaged.folder].experts == 1
    assert "cannot be used" in found[damaged.folder].problem
    assert sorted(info.manifest.dtype for info in found.values() if info.manifest) == ["int8", "nf4"]


def test_another_format_is_listed_with_what_is_known(offload):
    folder = open_store(offload).folder
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"version": 3', '"version": 7'))
    (info,) = list_stores(offload)
    assert (info.manifest.model, info.manifest.version, info.problem) == (MODEL, 7, "format 7, not 3")


@pytest.mark.parametrize("name", ["app/extension", "app-0123456789ab/1.0_0", "app-0123456789/int8"])
def test_manifests_of_others_are_no_stores(offload, name):
    (offload / name).mkdir(parents=True)
    (offload / name / "manifest.json").write_text('{"version": 4}')
    assert list_stores(offload) == []


@pytest.mark.parametrize("delete", [False, True])
def test_verify_finds_every_damaged_expert(offload, delete):
    store = open_store(offload)
    paths = []
    for number in range(6):
        store.write(key(number), data_of(number))
        paths.append(store.find(key(number)).path)
    flip(paths[1], 5000)
    flip(paths[2], 20)
    paths[3].write_bytes(paths[3].read_bytes()[:-1])
    paths[4].write_bytes(paths[5].read_bytes())
    told: list[tuple[int, int]] = []
    report = verify_store(store.folder, lambda *step: told.append(step), delete=delete)
    assert [path for path, _ in report.damaged] == paths[1:5]
    assert report.experts == 6
    assert report.nbytes == 6 * FILE_BYTES - 1
    assert told == sorted(told)
    assert told[-1] == (report.nbytes, report.nbytes)
    assert [path.exists() for path in paths] == [True, *[not delete] * 4, True]
    if delete:
        assert verify_store(store.folder).damaged == ()


def test_verify_reads_long_files_piece_by_piece(offload, monkeypatch):
    monkeypatch.setattr("switchrun.store.upkeep._CHUNK_BYTES", 100)
    store = open_store(offload)
    store.write(key(0), data_of(0))
    assert verify_store(store.folder).damaged == ()
    flip(store.find(key(0)).path, FILE_BYTES - 1)
    assert len(verify_store(store.folder).damaged) == 1


def test_verify_needs_a_manifest(offload):
    store = open_store(offload)
    (store.folder / "manifest.json").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"nothing in it can be verified: it has no manifest\.json"):
        verify_store(store.folder)


def test_clear_deletes_the_store_and_nothing_else(offload):
    store, other = open_store(offload), open_store(offload, dtype="nf4")
    for number in range(3):
        store.write(key(number), data_of(number))
    other.write(key(0), data_of(0))
    (store.folder / ".1-00000000.tmp").write_text("left over")
    told: list[tuple[int, int]] = []
    assert clear_store(store.folder, lambda *step: told.append(step)) == 3 * FILE_BYTES
    assert told == [(FILE_BYTES * n, FILE_BYTES * 3) for n in (1, 2, 3)]
    assert not store.folder.exists()
    assert verify_store(other.folder).experts == 1
    clear_store(other.folder)
    assert list(offload.iterdir()) == []


def test_clear_leaves_what_is_not_its_own(offload, tmp_path):
    store = open_store(offload)
    store.write(key(0), data_of(0))
    block = store.find(key(0)).path.parent
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (block / "1.safetensors").symlink_to(outside)
    (block / "notes.txt").write_text("mine")
    (block / "01.safetensors").write_text("mine")
    (store.folder / "encoder.x").mkdir()
    assert clear_store(store.folder) == FILE_BYTES
    assert sorted(path.name for path in block.iterdir()) == ["01.safetensors", "1.safetensors", "notes.txt"]
    assert outside.read_text() == "mine"
    assert clear_store(store.folder) == 0
