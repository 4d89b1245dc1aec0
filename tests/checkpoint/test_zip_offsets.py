"""Computed places in torch's zips against those that the local headers name."""

from __future__ import annotations

import os
import random
import zipfile
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data
from torch.utils.serialization import config

from switchrun.checkpoint.zip_offsets import LOCAL_HEADER_BYTES, data_offset, stored_offsets
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config

Entries = tuple[list[zipfile.ZipInfo], int]


def directory(path: Path) -> Entries:
    with zipfile.ZipFile(path) as archive:
        return archive.infolist(), archive.start_dir


def by_headers(path: Path, entries: list[zipfile.ZipInfo]) -> list[int | None]:
    with path.open("rb") as file:
        return [
            data_offset(each.header_offset, os.pread(file.fileno(), LOCAL_HEADER_BYTES, each.header_offset))
            for each in entries
        ]


def assert_all_computed(path: Path, alignment: int = 64) -> None:
    entries, end = directory(path)
    found = stored_offsets(entries, end, alignment)
    assert None not in found
    assert found == by_headers(path, entries)


@pytest.mark.parametrize("name", ["a.pt", "pytorch_model-00001-of-00364.bin", "ein Modell für alle.pt"])
def test_files_of_any_sizes(tmp_path: Path, name: str) -> None:
    # The root folder in the zip is called after the file, which moves everything.
    sizes = [0, 1, 2, 63, 64, 65, 1000, 0, *range(100, 300, 7)]
    path = tmp_path / name
    torch.save({f"w{i}": torch.arange(size, dtype=torch.uint8) for i, size in enumerate(sizes)}, path)
    assert_all_computed(path)
    entries, end = directory(path)
    data = path.read_bytes()
    for entry, at in zip(entries, stored_offsets(entries, end), strict=True):
        if (number := entry.filename.rpartition("/data/")[2]).isdecimal():
            assert at is not None
            assert data[at : at + entry.file_size] == bytes(i % 256 for i in range(sizes[int(number)]))


def test_a_checkpoint(tmp_path: Path) -> None:
    folder = save_checkpoint(random_model(tiny_config()), tmp_path / "m", container="torch", sharded=True)
    for path in folder.glob("*.bin"):
        assert_all_computed(path)


def test_many_entries(tmp_path: Path) -> None:
    # Their keys grow from one digit to four.
    torch.save([torch.zeros(i % 50) for i in range(1500)], tmp_path / "m.pt")
    assert_all_computed(tmp_path / "m.pt")


def test_sizes_and_places_of_more_than_32_bits(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with FakeTensorMode():
        weights = [torch.empty(size, dtype=torch.uint8) for size in (10, (1 << 32) - 1, 0, 3)]
    with skip_data(materialize_fake_tensors=True):
        torch.save(weights, path)
    assert path.stat().st_blocks * 512 < 1 << 20  # Holes.
    assert_all_computed(path)


@pytest.mark.parametrize("alignment", [128, 4096])
def test_another_alignment(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "m.pt"
    with config.patch({"save.storage_alignment": alignment}):
        torch.save([torch.ones(i) for i in range(20)], path)
    assert_all_computed(path, alignment)
    # Unless it is known, the two sides disagree.
    entries, end = directory(path)
    for found, real in zip(stored_offsets(entries, end), by_headers(path, entries), strict=True):
        assert found in (None, real)


def test_the_order_of_the_directory_does_not_matter(tmp_path: Path) -> None:
    torch.save([torch.ones(i) for i in range(20)], tmp_path / "m.pt")
    entries, end = directory(tmp_path / "m.pt")
    random.Random(0).shuffle(entries)
    assert stored_offsets(entries, end) == by_headers(tmp_path / "m.pt", entries)


def test_zips_of_other_programs_are_left_to_their_headers(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(40):
            archive.writestr(f"m/data/{i}", bytes(i))
    entries, end = directory(path)
    for found, real in zip(stored_offsets(entries, end), by_headers(path, entries), strict=True):
        assert found in (None, real)
    assert stored_offsets(entries, end).count(None) > 20


def test_a_damaged_directory_is_not_believed(tmp_path: Path) -> None:
    torch.save([torch.ones(8), torch.ones(8)], tmp_path / "m.pt")
    clean, end = directory(tmp_path / "m.pt")
    places = stored_offsets(clean, end)
    at = next(i for i, entry in enumerate(clean) if entry.filename.endswith("/data/1"))
    for field, value in (("header_offset", -(1 << 40)), ("header_offset", 1 << 62), ("compress_size", 33)):
        entries, _ = directory(tmp_path / "m.pt")
        setattr(entries[at], field, value)
        found = stored_offsets(entries, end)
        assert found[at] is None
        assert all(new in (None, old) for new, old in zip(found, places, strict=True))
    # Two entries of one place.
    entries, _ = directory(tmp_path / "m.pt")
    entries[at].header_offset = entries[at - 1].header_offset
    assert None in (stored_offsets(entries, end)[at], stored_offsets(entries, end)[at - 1])
    assert stored_offsets([], 0) == []


def test_what_is_no_local_header() -> None:
    assert data_offset(100, b"PK\x03\x04" + bytes(22) + b"\x05\x00\x03\x00") == 138
    assert data_offset(100, b"PK\x03\x04" + bytes(25)) is None
    assert data_offset(100, b"PK\x01\x02" + bytes(26)) is None
