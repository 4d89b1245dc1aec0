"""Links and odd files in the offload folder: nothing outside is changed, and nothing hangs."""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from switchrun.errors import CorruptCheckpointError
from switchrun.machine.folders import open_below
from switchrun.store import clear_store, list_stores, store_folder, stored_experts, verify_store
from tests.store.conftest import LAYOUT, MODEL, data_of, flip, holds, key, open_store

FILE_BYTES = 4096 + LAYOUT.nbytes

#: What may be a link, by its place in the offload folder's three levels.
PLACES = ["model", "dtype", "block", "expert", "manifest", "temporary"]


def place_of(offload: Path, name: str) -> Path:
    folder = store_folder(offload, MODEL, "int8")
    return {
        "model": folder.parent,
        "dtype": folder,
        "block": folder / "encoder.1",
        "expert": folder / "encoder.1" / "1.safetensors",
        "manifest": folder / "manifest.json",
        "temporary": folder / ".1-00000000.tmp",
    }[name]


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def state(folder: Path) -> dict[Path, tuple[object, ...]]:
    """Everything that can be seen of files: names, kinds, times and bytes; those of reading left out."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        data = path.read_bytes() if path.is_file() else b""
        found[path] = (status.st_mode, status.st_ino, status.st_nlink, status.st_mtime_ns, status.st_ctime_ns, data)
    return found


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A store of the very same model elsewhere, with two experts, a damaged one, and files called like ours."""
    folder = tmp_path / "outside"
    store = open_store(folder)
    for number in (1, 2, 3):
        store.write(key(number), data_of(number))
    flip(store.find(key(2)).path, 5000)
    (store.folder / ".1-00000000.tmp").write_text("mine")
    (store.folder / "encoder.1" / "7.safetensors").write_text("mine")
    return folder


def do_everything(offload: Path) -> None:
    """Use, prepare, limit, list, verify and clear a store, whatever comes of it."""
    folder = store_folder(offload, MODEL, "int8")
    for options in ({"read_only": True}, {}, {"limit_bytes": FILE_BYTES}, {"limit_bytes": 1}):
        try:
            store = open_store(offload, [], **options)
        except CorruptCheckpointError:
            continue
        for number in (1, 2, 7, 9):
            store.expect(key(number))
            store.find(key(number))
            store.verify(key(number), data_of(number))
            store.discard(key(number))
            store.write(key(number), data_of(number))
            store.discard(key(number))
    for info in list_stores(offload):
        try:
            verify_store(info.folder, delete=True)
        except CorruptCheckpointError:
            continue
    for each in {folder, *(info.folder for info in list_stores(offload))}:
        try:
            clear_store(each)
        except OSError:
            continue


@pytest.mark.parametrize("place", PLACES)
def test_no_link_is_followed_to_change_anything(offload, outside, place):
    store = open_store(offload)
    for number in (1, 2):
        store.write(key(number), data_of(number))
    link = place_of(offload, place)
    remove(link)
    link.symlink_to(place_of(outside, place))
    before = state(outside)
    do_everything(offload)
    assert state(outside) == before


@pytest.mark.parametrize("place", PLACES[:3])
def test_what_lies_behind_a_linked_folder_is_not_there(offload, outside, place):
    open_store(offload)
    link = place_of(offload, place)
    remove(link)
    link.symlink_to(place_of(outside, place))
    warnings: list[str] = []
    store = open_store(offload, warnings)
    assert store.expect(key(1)) is None
    assert store.find(key(1)) is None
    assert not store.has_file(key(1))
    assert list(stored_experts(store.folder)) == []
    assert not store.write(key(1), data_of(1))
    reason = f"{link.name} is a link, and links are not followed there"
    assert warnings == [f"{store.folder} cannot be written: {reason}; no more experts are stored there"]
    assert [info.experts for info in list_stores(offload)] == ([0] if place == "block" else [])


def test_a_link_in_the_place_of_an_expert_is_a_damaged_expert(offload, outside):
    open_store(offload).write(key(1), data_of(1))
    path = place_of(offload, "expert")
    path.unlink()
    path.symlink_to(place_of(outside, "expert"))
    before = state(outside)
    warnings: list[str] = []
    store = open_store(offload, warnings)
    assert store.find(key(1)) is None
    assert warnings == [f"{path} is damaged: it is a link, not a file; the expert is taken from the checkpoint again"]
    assert not os.path.lexists(path)
    assert store.write(key(1), data_of(1))
    assert holds(store, 1)
    assert not path.is_symlink()
    assert state(outside) == before


def test_the_offload_folder_itself_may_be_a_link(offload, tmp_path):
    real = tmp_path / "another disk"
    real.mkdir()
    offload.symlink_to(real)
    store = open_store(offload)
    assert store.write(key(1), data_of(1))
    assert holds(open_store(offload), 1)
    (info,) = list_stores(offload)
    assert verify_store(info.folder).experts == 1
    clear_store(info.folder)
    assert offload.is_symlink()
    assert list(real.iterdir()) == []


@pytest.mark.parametrize("place", PLACES[:3])
def test_a_link_that_is_put_there_in_the_middle_of_a_write_leads_nowhere(offload, outside, monkeypatch, place):
    store, real = open_store(offload, []), os.replace
    store.write(key(1), data_of(1))
    link = place_of(offload, place)

    def replace(*names: str, **folders: int) -> None:
        link.rename(offload.parent / "moved")
        link.symlink_to(place_of(outside, place))
        real(*names, **folders)

    before = state(outside)
    monkeypatch.setattr(os, "replace", replace)
    store.write(key(1), data_of(1))
    assert state(outside) == before


def test_a_folder_is_opened_once_and_then_it_does_not_matter_what_has_its_name(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    with open_below(tmp_path, "a", "b") as handle:
        (tmp_path / "a").rename(tmp_path / "moved")
        (tmp_path / "a").symlink_to(tmp_path / "elsewhere")
        os.mkdir("new", dir_fd=handle)
    assert (tmp_path / "moved" / "b" / "new").is_dir()
    with pytest.raises(NotADirectoryError, match="a is a link"), open_below(tmp_path, "a", "b", make=True):
        pass
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_no_descriptor_is_left_open(offload, outside):
    before = len(list(Path("/proc/self/fd").iterdir()))
    do_everything(offload)
    place_of(offload, "model").symlink_to(place_of(outside, "model"))
    do_everything(offload)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(path.parent, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{here}/{path.name}")  # the whole path would be too long
        os.close(here)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("may not make devices")


def make_sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


#: What is no file, or none of ours, and what is said of it in an expert's place.
KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "it is a FIFO, not a file"),
    "socket": (make_socket, "it is a socket, not a file"),
    "device": (make_device, "it is a device, not a file"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "it is a link, not a file"),
    "circle": (lambda path: path.symlink_to(path), "it is a link, not a file"),
    "sparse": (make_sparse, "its header is not that of this expert"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_expert_is_neither_waited_for_nor_read_without_end(offload, kind):
    make, words = KINDS[kind]
    open_store(offload).write(key(1), data_of(1))
    path = place_of(offload, "expert")
    path.unlink()
    make(path)
    (info,) = list_stores(offload)
    assert verify_store(info.folder).experts == (kind == "sparse")  # the others are not its own
    warnings: list[str] = []
    store = open_store(offload, warnings)
    assert store.has_file(key(1))
    assert store.expect(key(1)) is None
    assert warnings == [f"{path} is damaged: {words}; the expert is taken from the checkpoint again"]
    assert store.write(key(1), data_of(1))
    assert holds(open_store(offload), 1)


@pytest.mark.parametrize("kind", [*KINDS, "folder"])
def test_what_is_no_manifest_is_refused(offload, kind):
    store = open_store(offload)
    store.write(key(1), data_of(1))
    path = place_of(offload, "manifest")
    path.unlink()
    make, words = KINDS.get(kind, (Path.mkdir, "it is a folder, not a file"))
    words = "a file of its kind 4194304 at most" if kind == "sparse" else words
    make(path)
    for read_only in (True, False):
        with pytest.raises(CorruptCheckpointError, match=words) as refused:
            open_store(offload, read_only=read_only)
        assert "offload clear" in refused.value.hint
    (info,) = list_stores(offload)
    assert words in info.problem
    if kind != "folder":
        clear_store(store.folder)
        assert open_store(offload).write(key(1), data_of(1))


@pytest.mark.parametrize("place", PLACES[:3])
def test_what_is_no_folder_is_not_waited_for(offload, place):
    open_store(offload)
    path = place_of(offload, place)
    remove(path)
    os.mkfifo(path)
    do_everything(offload)
    warnings: list[str] = []
    store = open_store(offload, warnings)
    assert not store.write(key(1), data_of(1))
    assert len(warnings) == 1
    assert "Not a directory" in warnings[0]


def test_a_leftover_that_is_no_file_stays(offload):
    store = open_store(offload)
    os.mkfifo(store.folder / ".1-00000000.tmp")
    (store.folder / ".1-00000001.tmp").mkdir()
    open_store(offload)
    store.write(key(1), data_of(1))
    clear_store(store.folder)
    assert sorted(path.name for path in store.folder.iterdir()) == [".1-00000000.tmp", ".1-00000001.tmp"]
