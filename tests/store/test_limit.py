"""The folder stays within its limit, and loses what was used least recently."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from switchrun.store import ExpertStore, expert_store, limit
from tests.store.conftest import LAYOUT, data_of, holds, key, open_store

FILE_BYTES = 4096 + LAYOUT.nbytes


@pytest.fixture(autouse=True)
def always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the folder be looked through before every write, not after some time."""
    monkeypatch.setattr(limit, "_SCAN_SHARE", 0)


def there(store: ExpertStore) -> list[int]:
    return sorted(int(path.stem) for path in store.folder.glob("*/*.safetensors"))


def fill(offload: Path, count: int, ages: dict[int, float] | None = None) -> ExpertStore:
    """Write experts 0, 1, …, last used some seconds ago: the first one longest ago, unless `ages` says more."""
    store = open_store(offload)
    for number in range(count):
        assert store.write(key(number), data_of(number))
        age = (ages or {}).get(number, 1000 - number)
        os.utime(store.find(key(number)).path, (time.time() - age,) * 2)
    return store


def test_the_oldest_goes_first(offload):
    store = open_store(offload, limit_bytes=3 * FILE_BYTES + 100)
    for number in range(6):
        assert store.write(key(number), data_of(number))
        assert sum(path.stat().st_size for path in store.folder.glob("*/*.safetensors")) <= 3 * FILE_BYTES + 100
    assert there(store) == [3, 4, 5]
    assert [store.find(key(number)) is None for number in range(6)] == [True] * 3 + [False] * 3


def test_use_within_the_process_counts(offload):
    store = open_store(offload, limit_bytes=3 * FILE_BYTES)
    for number in range(3):
        store.write(key(number), data_of(number))
    store.find(key(0))
    store.write(key(3), data_of(3))
    assert there(store) == [0, 2, 3]


def test_use_by_an_earlier_process_counts(offload):
    fill(offload, 4)
    assert open_store(offload).find(key(0))
    store = open_store(offload, limit_bytes=4 * FILE_BYTES)
    store.write(key(4), data_of(4))
    assert there(store) == [0, 2, 3, 4]


def test_a_file_is_touched_once_in_a_process(offload):
    fill(offload, 1)
    store = open_store(offload)
    path = store.find(key(0)).path
    assert path.stat().st_mtime > time.time() - 100
    os.utime(path, (5, 5))
    store.find(key(0))
    assert path.stat().st_mtime == 5


def test_a_lower_limit_than_last_time(offload):
    fill(offload, 5, ages={2: 5000})
    store = open_store(offload, limit_bytes=3 * FILE_BYTES)
    assert there(store) == [1, 3, 4]
    assert all(holds(store, number) for number in there(store))


def test_what_others_write_counts(offload):
    store = open_store(offload, limit_bytes=3 * FILE_BYTES)
    store.write(key(9), data_of(9))
    fill(offload, 6)
    assert store.write(key(7), data_of(7))
    assert there(store) == [5, 7, 9]


@pytest.mark.parametrize("share", [0, 1e12])
def test_an_expert_written_again_counts_once(offload, monkeypatch, share):
    monkeypatch.setattr(limit, "_SCAN_SHARE", share)
    store = open_store(offload, limit_bytes=3 * FILE_BYTES)
    for number in (0, 1, 1, 1):
        assert store.write(key(number), data_of(number))
    assert there(store) == [0, 1]


def test_an_expert_that_another_process_removed_is_just_gone(offload):
    reader = fill(offload, 3)
    assert reader.find(key(0))
    open_store(offload, limit_bytes=FILE_BYTES)
    assert not reader.find(key(0)).path.exists()  # remembered: whoever fails to open it says so
    reader.discard(key(0))
    assert reader.find(key(0)) is None


def test_less_than_one_expert(offload):
    warnings: list[str] = []
    store = open_store(offload, warnings, limit_bytes=FILE_BYTES - 1)
    for number in range(3):
        assert not store.write(key(number), data_of(number))
    assert there(store) == []
    assert len(warnings) == 1
    assert "the limit leaves no room" in warnings[0]


def test_files_that_cannot_be_deleted_are_not_exceeded(offload, monkeypatch):
    fill(offload, 3)
    warnings: list[str] = []
    store = open_store(offload, warnings, limit_bytes=3 * FILE_BYTES)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "unlink", refuse)
    assert not store.write(key(3), data_of(3))
    assert there(store) == [0, 1, 2]
    assert len(warnings) == 1


def test_many_jobs_stay_within_it_together(offload, monkeypatch):
    real, sizes, bound = expert_store.write_atomically, [], 4 * FILE_BYTES
    store = open_store(offload, limit_bytes=bound)

    def measured(*args: Any) -> None:
        real(*args)
        files = [path for path in store.folder.rglob("*") if path.suffix in (".safetensors", ".tmp")]
        with_sizes = []
        for path in files:
            try:
                with_sizes.append(path.stat().st_size)
            except FileNotFoundError:
                continue
        sizes.append(sum(with_sizes))

    monkeypatch.setattr(expert_store, "write_atomically", measured)
    done: list[bool] = []

    def job(first: int) -> None:
        done.extend([store.write(key(number), data_of(number)) for number in range(first, first + 10)])

    jobs = [threading.Thread(target=job, args=(first,)) for first in (0, 10, 20)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join(30)
    assert done == [True] * 30
    assert max(sizes) <= bound
    assert len(there(store)) == 4


def test_a_file_that_has_just_got_its_name_counts_once(offload, monkeypatch):
    """Another job makes room between a file's rename and the note that it was written: one expert must go, not two."""
    real = expert_store.write_atomically
    store = open_store(offload, limit_bytes=3 * FILE_BYTES)
    for number in (0, 1):
        store.write(key(number), data_of(number))

    def between(*args: Any) -> None:
        monkeypatch.setattr(expert_store, "write_atomically", real)
        real(*args)
        assert store.write(key(3), data_of(3))

    monkeypatch.setattr(expert_store, "write_atomically", between)
    assert store.write(key(2), data_of(2))
    assert there(store) == [1, 2, 3]


@pytest.mark.parametrize(("share", "looks"), [(0, 6), (1e12, 1)])
def test_the_folder_is_not_looked_through_all_the_time(offload, monkeypatch, share, looks):
    monkeypatch.setattr(limit, "_SCAN_SHARE", share)
    real, calls = limit.stored_experts, []
    monkeypatch.setattr(limit, "stored_experts", lambda folder: (calls.append(folder), real(folder))[1])
    store = open_store(offload, limit_bytes=3 * FILE_BYTES)
    for number in range(5):
        assert store.write(key(number), data_of(number))
    assert len(calls) == looks
    assert there(store) == [2, 3, 4]
