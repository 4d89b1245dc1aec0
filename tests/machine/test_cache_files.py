"""Files in the cache folder: forged, exchanged or odd ones count as absent, and nothing outside is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from switchrun.machine import disks
from switchrun.machine.folders import cache_folder, offload_folder, read_cache_file, write_cache_file


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is remembered of disks; every path lies on the same one."""
    monkeypatch.setattr(disks, "filesystem_id", lambda _: "ext4 /dev/sda1")
    cache_folder().mkdir(parents=True)
    return cache_folder() / "bandwidth.json"


def test_there_and_back(tmp_path: Path) -> None:
    for path in (tmp_path / "new" / "a.json", tmp_path / "new" / "index" / "a.json"):
        for data in (b"one", b"two"):
            write_cache_file(path, data)
            assert read_cache_file(path, 3) == data
        assert [each.name for each in path.parent.iterdir() if each.is_file()] == ["a.json"]
        with pytest.raises(OSError, match="a file of its kind 2 at most"):
            read_cache_file(path, 2)


@pytest.mark.parametrize("name", ["a.json", "index/a.json"])
def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path: Path, name: str) -> None:
    outside, path = tmp_path / "outside", tmp_path / "cache" / name
    outside.write_bytes(b"mine")
    path.parent.mkdir(parents=True)
    path.symlink_to(outside)
    with pytest.raises(OSError, match="it is a link, not a file"):
        read_cache_file(path, 100)
    write_cache_file(path, b"new")
    assert outside.read_bytes() == b"mine"
    assert not path.is_symlink()
    assert read_cache_file(path, 100) == b"new"


def test_the_folder_of_indexes_may_not_be_a_link_and_the_cache_folder_may(tmp_path: Path) -> None:
    outside, cache = tmp_path / "outside", tmp_path / "cache"
    outside.mkdir()
    cache.symlink_to(outside)
    write_cache_file(cache / "a.json", b"x")
    assert (outside / "a.json").read_bytes() == b"x"
    (outside / "elsewhere").mkdir()
    (outside / "elsewhere" / "a.json").write_bytes(b"forged")
    (cache / "index").symlink_to(outside / "elsewhere")
    write_cache_file(cache / "index" / "a.json", b"x")
    assert (outside / "elsewhere" / "a.json").read_bytes() == b"forged"
    with pytest.raises(OSError, match="index is a link"):
        read_cache_file(cache / "index" / "a.json", 100)


def test_nobody_can_foretell_the_temporary_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, names = os.open, []

    def note(path: str, flags: int, *args: int, **options: int) -> int:
        if flags & os.O_CREAT:
            assert flags & os.O_EXCL
            names.append(path)
        return real(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", note)
    for _ in range(2):
        write_cache_file(file, b"x")
    assert len(set(names)) == 2
    assert all(len(name) > 16 for name in names)


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, place: str) -> None:
    path = tmp_path / "cache" / "a.json"
    if place == "folder":
        path.parent.write_text("a file")
    else:
        path.mkdir(parents=True)
    write_cache_file(path, b"x")
    assert not list(tmp_path.rglob("*.tmp"))
    assert path.is_dir() == (place == "file")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_waited_for(file: Path, make: object) -> None:
    assert callable(make)
    make(file)
    assert disks.known_bandwidth(Path("/x")) is None


def test_a_file_without_an_end_is_not_read(file: Path) -> None:
    file.touch()
    os.truncate(file, 1 << 40)
    assert disks.known_bandwidth(Path("/x")) is None
    disks.remember_bandwidth(Path("/x"), 1e9)
    assert disks.known_bandwidth(Path("/x")) == 1e9


@pytest.mark.parametrize(
    "value", ["0", "-1", "1e-9", "1e300", "1" * 400, "NaN", "Infinity", "true", "null", '"1e9"', "[1e9]", '{"a": 1}']
)
def test_a_forged_bandwidth_counts_as_none(file: Path, value: str) -> None:
    file.write_text(f'{{"ext4 /dev/sda1": {value}}}')
    assert disks.known_bandwidth(Path("/x")) is None
    disks.remember_bandwidth(Path("/x"), 1e9)
    assert disks.known_bandwidth(Path("/x")) == 1e9


@pytest.mark.parametrize(
    "text", ["", "{", "3", "[]", "\xff", "[" * 100_000, '{"a": ' + "[" * 900 + "]" * 900 + "}", '{"a": {"b": [[]]}}']
)
def test_what_is_no_record_is_begun_again(file: Path, text: str) -> None:
    file.write_bytes(text.encode("latin-1"))
    assert disks.known_bandwidth(Path("/x")) is None
    disks.remember_bandwidth(Path("/x"), 1e9)
    assert disks.known_bandwidth(Path("/x")) == 1e9


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_readme_that_is_none_does_not_hold_up_the_start(make: object) -> None:
    assert callable(make)
    here = Path("offload")
    here.mkdir()
    make(here / "README.md")
    assert offload_folder(None) == cache_folder() / "offload"
    (here / "index").mkdir()
    (here / "index" / f"{'0a' * 16}.json").write_text("{}")
    assert offload_folder(None) == here
