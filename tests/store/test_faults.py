"""Disks that are full, read-only or failing, and damaged files: the fill goes on, and the user is told once."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from switchrun.store import BackgroundWriter, ExpertStore, Layout, clear_store
from switchrun.store.manifest import read_manifest
from tests.store.conftest import LAYOUT, data_of, flip, holds, key, no_temporaries, open_store, read

BIG = Layout.of([("wi.weight", "I8", (300_000,))])


def check_stopped(store: ExpertStore, warnings: list[str], reason: str) -> None:
    """The store has given up writing, has said so once, and still serves expert 1."""
    assert not store.writable
    assert not store.write(key(8), data_of(8, store.layout))
    with BackgroundWriter(store) as writer:
        assert not writer.offer(key(8), memoryview(data_of(8, store.layout)))
    assert warnings == [f"{store.folder} cannot be written: {reason}; no more experts are stored there"]
    assert holds(store, 1)
    assert store.find(key(8)) is None
    assert no_temporaries(store)


def test_a_full_disk(tmpfs):
    offload, warnings = tmpfs("size=1m"), []
    store = open_store(offload, warnings, layout=BIG)
    stored = [n for n in range(1, 8) if store.write(key(n), data_of(n, BIG))]
    assert stored == [1, 2, 3]
    check_stopped(store, warnings, "No space left on device")
    fresh = open_store(offload, layout=BIG)
    assert all(holds(fresh, n) for n in stored)


def test_a_disk_that_fills_up_behind_the_model(tmpfs):
    offload, warnings = tmpfs("size=1m"), []
    store = open_store(offload, warnings, layout=BIG)
    with BackgroundWriter(store) as writer:
        for number in range(1, 8):
            writer.offer(key(number), memoryview(data_of(number, BIG)))
            writer.flush()
    check_stopped(store, warnings, "No space left on device")


@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_every_call_may_fail(offload, monkeypatch, call, code):
    warnings: list[str] = []
    store = open_store(offload, warnings)
    assert store.write(key(1), data_of(1))
    real = getattr(os, call)

    def fail(*args: Any, **options: Any) -> Any:
        if call == "open" and not args[1] & os.O_CREAT:
            return real(*args, **options)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    assert not store.write(key(2), data_of(2))
    monkeypatch.undo()
    check_stopped(store, warnings, os.strerror(code))


def test_a_write_may_take_less_than_it_was_given(offload, monkeypatch):
    store, real = open_store(offload), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, position: real(file, data[:1000], position))
    assert store.write(key(1), data_of(1))
    monkeypatch.undo()
    assert holds(open_store(offload), 1)


def test_a_read_only_disk(tmpfs):
    offload, warnings = tmpfs("size=4m"), []
    store = open_store(offload)
    for number in (1, 2):
        store.write(key(number), data_of(number))
    damaged = store.find(key(2)).path
    flip(damaged, damaged.stat().st_size - 1)
    tmpfs("remount,ro", again=offload)

    store = open_store(offload, warnings)
    assert holds(store, 1)
    assert not store.verify(key(2), read(store, key(2)))
    store.discard(key(2))
    assert store.find(key(2)) is None  # although the file cannot be deleted
    assert [("damaged" in text) for text in warnings] == [True]
    warnings.clear()
    assert not store.write(key(3), data_of(3))
    check_stopped(store, warnings, "Read-only file system")


def test_a_damaged_file_that_cannot_be_deleted_can_be_replaced(offload, monkeypatch):
    warnings: list[str] = []
    store = open_store(offload, warnings)
    store.write(key(1), data_of(1))
    flip(store.find(key(1)).path, 5000)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        store.discard(key(1))
    assert store.find(key(1)) is None
    assert store.write(key(1), data_of(1))
    assert holds(store, 1)
    assert len(warnings) == 1
    store.discard(key(1))
    open_store(offload).write(key(1), data_of(1))
    assert holds(store, 1)


def test_giving_up_is_told_once(offload):
    warnings: list[str] = []
    store = open_store(offload, warnings)
    store.stop_writing("one")
    store.stop_writing("two")
    assert warnings == [f"{store.folder} cannot be written: one; no more experts are stored there"]


def test_a_new_store_on_a_read_only_disk(tmpfs):
    offload, warnings = tmpfs("size=4m"), []
    tmpfs("remount,ro", again=offload)
    store = open_store(offload, warnings)
    assert store.find(key(1)) is None
    assert not store.write(key(1), data_of(1))
    assert warnings == [f"{store.folder} cannot be written: Read-only file system; no more experts are stored there"]


def test_an_offload_folder_that_is_a_file(offload):
    offload.write_text("")
    warnings: list[str] = []
    store = open_store(offload, warnings)
    assert store.find(key(1)) is None
    assert not store.write(key(1), data_of(1))
    assert len(warnings) == 1
    assert offload.read_text() == ""


def test_read_only_by_choice_changes_nothing(offload):
    store = open_store(offload)
    for number in (1, 2):
        store.write(key(number), data_of(number))
    path = store.find(key(2)).path
    flip(path, path.stat().st_size - 1)
    (store.folder / ".1-00000000.tmp").write_text("left over")
    before = {file: file.stat() for file in sorted(offload.rglob("*"))}

    warnings: list[str] = []
    store = open_store(offload, warnings, read_only=True, limit_bytes=1)
    assert not store.writable
    assert not store.write(key(3), data_of(3))
    assert warnings == []
    assert holds(store, 1)
    store.discard(key(2))
    assert store.find(key(2)) is None
    assert len(warnings) == 1
    after = {file: file.stat() for file in sorted(offload.rglob("*"))}
    assert {file: (s.st_mtime_ns, s.st_size) for file, s in after.items()} == {
        file: (s.st_mtime_ns, s.st_size) for file, s in before.items()
    }


def check_rebuilt(offload: Path, path: Path) -> None:
    """Expert 1 is found to be damaged, by its header or by its checksum; it is discarded, and can be written again."""
    warnings: list[str] = []
    store = open_store(offload, warnings)
    data = read(store, key(1))
    if data is not None:
        assert not store.verify(key(1), data)
        store.discard(key(1))
    assert len(warnings) == 1
    assert str(path) in warnings[0]
    assert "damaged" in warnings[0]
    assert not path.exists()
    assert store.find(key(1)) is None
    assert store.write(key(1), data_of(1))
    assert holds(store, 1)
    assert len(warnings) == 1


# The length, the braces, the checksum's first and last digit, the names, the padding, and the data's ends.
@pytest.mark.parametrize("position", [0, 7, 8, 36, 51, 70, 300, 4095, 4096, 4096 + LAYOUT.nbytes - 1])
def test_a_flipped_bit(offload, position):
    open_store(offload).write(key(1), data_of(1))
    path = open_store(offload).find(key(1)).path
    flip(path, position)
    check_rebuilt(offload, path)


@pytest.mark.parametrize("size", [0, 7, 100, 4095, 4096, 4096 + LAYOUT.nbytes - 1, 4096 + LAYOUT.nbytes + 1])
def test_a_truncated_or_longer_file(offload, size):
    open_store(offload).write(key(1), data_of(1))
    path = open_store(offload).find(key(1)).path
    os.truncate(path, size)
    check_rebuilt(offload, path)


@pytest.mark.parametrize("options", [{"model": "other"}, {"fingerprint": "f2"}, {}], ids=["model", "state", "expert"])
def test_a_file_of_something_else(offload, tmp_path, options):
    store = open_store(offload)
    store.write(key(1), data_of(1))
    other = open_store(tmp_path / "other", **options)
    other.write(key(2 if not options else 1), data_of(2))
    path = store.find(key(1)).path
    path.write_bytes(other.find(key(2 if not options else 1)).path.read_bytes())
    check_rebuilt(offload, path)


def test_damage_that_is_found_by_a_process_that_knew_the_file(offload):
    warnings: list[str] = []
    store = open_store(offload, warnings)
    store.write(key(1), data_of(1))
    assert holds(store, 1)
    flip(store.find(key(1)).path, 5000)
    assert not store.verify(key(1), read(store, key(1)))


def test_damage_after_a_good_read_is_found_too(offload):
    warnings: list[str] = []
    store = open_store(offload, warnings)
    store.write(key(1), data_of(1))
    for _ in range(2):
        assert store.verify(key(1), read(store, key(1)))
    flip(store.find(key(1)).path, 5000)
    assert not store.verify(key(1), read(store, key(1)))


def test_an_expert_that_another_process_made_anew_is_not_damaged(offload):
    reader, writer = open_store(offload), open_store(offload)
    writer.write(key(1), data_of(1))
    reader.find(key(1))
    writer.write(key(1), data_of(2))
    assert reader.verify(key(1), read(reader, key(1)))
    assert not reader.verify(key(1), data_of(1))


def test_an_expert_that_vanished_is_forgotten_without_a_word(offload):
    store = open_store(offload)  # its warnings fail the test
    store.write(key(1), data_of(1))
    store.find(key(1)).path.unlink()
    store.discard(key(1))
    assert store.find(key(1)) is None


def test_a_folder_that_was_cleared_meanwhile(offload):
    store = open_store(offload)
    store.write(key(1), data_of(1))
    clear_store(store.folder)
    assert not store.folder.exists()
    assert store.write(key(2), data_of(2))
    assert read_manifest(store.folder) == store.manifest
    store.discard(key(1))
    assert holds(open_store(offload), 2)


def test_a_folder_that_is_cleared_while_an_expert_is_written(offload, monkeypatch):
    store, real = open_store(offload), os.replace
    monkeypatch.setattr(os, "replace", lambda *names, **at: (clear_store(store.folder), real(*names, **at)))
    assert not store.write(key(1), data_of(1))
    monkeypatch.undo()
    assert store.write(key(1), data_of(1))
    assert holds(open_store(offload), 1)


def test_a_file_that_cannot_be_read_stays(offload):
    store = open_store(offload)
    store.write(key(1), data_of(1))
    path = store.find(key(1)).path
    path.unlink()
    path.mkdir()
    warnings: list[str] = []
    store = open_store(offload, warnings)
    assert [store.find(key(1)) for _ in range(3)] == [None] * 3
    assert warnings == [f"cannot read {path}: it is a folder, not a file; such experts are taken from the checkpoint"]


def test_opening_spares_the_file_that_is_being_written(offload, monkeypatch):
    store, real, seen = open_store(offload), os.replace, []

    def replace(temporary: str, target: str, **folders: int) -> None:
        open_store(offload)
        seen.append((store.folder / temporary).exists())
        real(temporary, target, **folders)

    monkeypatch.setattr(os, "replace", replace)
    assert store.write(key(1), data_of(1))
    assert seen == [True]
