"""Computed places in torch's zips against those that the local headers name."""

from __future__ import annotations

import bisect
import os
import zipfile
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import skip_data
from torch.utils.serialization import config

from switchrun.checkpoint.zip_offsets import Entry, computed_offset, local_header_bytes, stated_offset
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config


def directory(path: Path) -> list[Entry]:
    """The entries as the standard library reads them."""
    with zipfile.ZipFile(path) as archive:
        found = archive.infolist()
        ends = [*sorted(each.header_offset for each in found), archive.start_dir]
    entries = []
    for each in found:
        name = each.orig_filename.encode("utf-8" if each.flag_bits & 0x800 else "cp437")
        end = ends[bisect.bisect_right(ends, each.header_offset)]
        place = each.header_offset
        entries.append(Entry(name, each.flag_bits, each.compress_type, each.CRC, each.file_size, place, end))
    return entries


def computed(entries: list[Entry], alignment: int = 64) -> list[int | None]:
    return [computed_offset(entry, alignment) for entry in entries]


def by_headers(path: Path, entries: list[Entry]) -> list[int | None]:
    with path.open("rb") as file:
        return [stated_offset(each, os.pread(file.fileno(), each.header_bytes, each.place)) for each in entries]


def assert_all_computed(path: Path, alignment: int = 64) -> None:
    entries = directory(path)
    found = computed(entries, alignment)
    assert None not in found
    assert found == by_headers(path, entries)


@pytest.mark.parametrize("name", ["a.pt", "pytorch_model-00001-of-00364.bin", "ein Modell für alle.pt"])
def test_files_of_any_sizes(tmp_path: Path, name: str) -> None:
    # The root folder in the zip is called after the file, which moves everything.
    sizes = [0, 1, 2, 63, 64, 65, 1000, 0, *range(100, 300, 7)]
    path = tmp_path / name
    torch.save({f"w{i}": torch.arange(size, dtype=torch.uint8) for i, size in enumerate(sizes)}, path)
    assert_all_computed(path)
    data = path.read_bytes()
    for entry in directory(path):
        if (number := entry.name.rpartition(b"/data/")[2]).isdigit():
            at = computed_offset(entry)
            assert at is not None
            assert data[at : at + entry.nbytes] == bytes(i % 256 for i in range(sizes[int(number)]))


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
    entries = directory(path)
    for found, real in zip(computed(entries), by_headers(path, entries), strict=True):
        assert found in (None, real)


def test_zips_of_other_programs_are_left_to_their_headers(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(40):
            archive.writestr(f"m/data/{i}", bytes(i))
    entries = directory(path)
    for found, real in zip(computed(entries), by_headers(path, entries), strict=True):
        assert found in (None, real)
    assert computed(entries).count(None) > 20


def test_a_damaged_directory_is_not_believed(tmp_path: Path) -> None:
    torch.save([torch.ones(8), torch.ones(8)], tmp_path / "m.pt")
    entry = next(each for each in directory(tmp_path / "m.pt") if each.name.endswith(b"/data/1"))
    assert computed_offset(entry)
    for change in ({"place": 1 << 62}, {"nbytes": 33}, {"nbytes": 1 << 40}, {"end": entry.place}, {"name": b"x" * 99}):
        assert computed_offset(entry._replace(**change)) is None


def test_what_is_no_local_header() -> None:
    header = b"PK\x03\x04" + bytes(22) + b"\x05\x00\x03\x00"
    assert local_header_bytes(header) == 38
    assert local_header_bytes(header[:-1]) is None
    assert local_header_bytes(b"PK\x01\x02" + header[4:]) is None
    entry = Entry(b"a/b/c", 0, 0, 0, 8, 100, 200)
    assert stated_offset(entry, header + b"a/b/c") == 138
    assert stated_offset(entry, header + b"a/b/d") is None
    assert stated_offset(entry._replace(name=b"a/b"), header + b"a/b") is None
