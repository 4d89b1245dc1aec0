"""Disks: the offload folder as it is, as it may not be, and the checkpoint's files."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from switchrun.checkpoint import open_checkpoint
from switchrun.doctor import disks as doctor_disks
from switchrun.doctor.check import Check, Status
from switchrun.machine import disks
from switchrun.units import GIB, MIB
from tests.store.conftest import data_of, key, open_store

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def good_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast ext4 with room, whatever this machine has, and little to be written."""
    monkeypatch.setattr(disks, "filesystem_of", lambda path: "ext4")
    monkeypatch.setattr(disks, "measure_read_bandwidth", lambda ranges: 1.5e9 if sum(r[2] for r in ranges) else None)
    monkeypatch.setattr(doctor_disks, "_reads_directly", lambda file: True)
    monkeypatch.setattr(doctor_disks, "_SAMPLE_BYTES", MIB)
    set_free(monkeypatch, 50 * GIB)


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 100 * GIB - free, free))


def test_a_good_folder(tmp_path: Path) -> None:
    check = doctor_disks.check_offload_folder(tmp_path)
    assert (check.status, check.mend, check.exit_code) == (Status.OK, None, 0)
    assert check.finding == f"{tmp_path}: ext4, 50 GiB free, reads 1.50 GB/s"
    assert check.details == {
        "path": str(tmp_path),
        "filesystem": "ext4",
        "free_bytes": 50 * GIB,
        "read_bytes_per_second": 1.5e9,
        "direct_reads": True,
    }


def test_what_is_written_is_read_and_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def measure(ranges: list[doctor_disks.Range]) -> float:
        [(path, offset, length)] = ranges
        seen.append((offset, length, path.stat().st_size, len(path.read_bytes()), sorted(folder.iterdir())))
        return 1e9

    folder = tmp_path / "tier"
    folder.mkdir()
    monkeypatch.setattr(disks, "measure_read_bandwidth", measure)
    assert doctor_disks.check_offload_folder(folder).status is Status.OK
    size = doctor_disks._BLOCK_BYTES
    assert seen == [(0, size, size, size, [])]
    assert list(folder.iterdir()) == []


def test_no_more_is_written_than_a_tenth_of_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 0)
    check = doctor_disks.check_offload_folder(tmp_path)
    assert check.status is Status.WARN
    assert check.details["read_bytes_per_second"] is None
    assert "little room" in check.finding
    assert "make room" in (check.mend or "")


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    check = doctor_disks.check_offload_folder(folder)
    assert check.status is Status.OK
    assert check.finding.startswith(f"{folder}, not made yet: ext4")
    assert not folder.parent.exists()
    assert doctor_disks.check_offload_folder(Path("relative")).status is Status.OK


def fails_as_unwritable(check: Check) -> bool:
    assert "--offload-folder" in (check.mend or "")
    return check.status is Status.FAIL and check.exit_code == 9 and "cannot be written" in check.finding


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    assert fails_as_unwritable(doctor_disks.check_offload_folder(tmp_path / "file"))
    assert fails_as_unwritable(doctor_disks.check_offload_folder(tmp_path / "file" / "tier"))
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    assert fails_as_unwritable(doctor_disks.check_offload_folder(tmp_path / "broken"))
    # Nobody writes there, not even root, as whom tests may run.
    check = doctor_disks.check_offload_folder(Path("/proc/self/tier"))
    assert fails_as_unwritable(check)
    assert check.details == {"path": "/proc/self/tier"}

    def refuse(**_: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert doctor_disks.check_offload_folder(tmp_path).finding == f"{tmp_path} cannot be written: Permission denied"


def test_stored_experts_are_read_where_there_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path, model="demo", dtype="int8")
    for number in range(3):
        assert store.write(key(number), data_of(number))
    read: list[list[doctor_disks.Range]] = []
    monkeypatch.setattr(disks, "measure_read_bandwidth", lambda ranges: read.append(list(ranges)) or 1e9)
    doctor_disks.check_offload_folder(tmp_path)
    monkeypatch.setattr(doctor_disks, "_ENOUGH_BYTES", 1)
    doctor_disks.check_offload_folder(tmp_path)
    assert len(read[0]) == 1
    stored = sorted(tmp_path.rglob("*.safetensors"))
    assert sorted(read[1]) == [(path, 0, path.stat().st_size) for path in stored]


@pytest.mark.parametrize(
    ("filesystem", "direct", "rate", "finding", "mend"),
    [
        ("nfs4", True, 1e9, "network", "local disk"),
        ("fuse.sshfs", False, None, "network", "local disk"),
        ("tmpfs", True, 5e9, "it is memory", "on a disk"),
        ("zfs", False, None, "refuses O_DIRECT", "ext4"),
        ("ext4", True, 0.12e9, "reads 0.12 GB/s; that is slow", "faster disk"),
    ],
)
def test_what_a_disk_can_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    filesystem: str,
    direct: bool,
    rate: float | None,
    finding: str,
    mend: str,
) -> None:
    monkeypatch.setattr(disks, "filesystem_of", lambda path: filesystem)
    monkeypatch.setattr(disks, "measure_read_bandwidth", lambda ranges: rate)
    monkeypatch.setattr(doctor_disks, "_reads_directly", lambda file: direct)
    for check in (doctor_disks.check_offload_folder(tmp_path), doctor_disks.check_checkpoint(open_checkpoint())):
        assert (check.status, check.exit_code) == (Status.WARN, 0)
        assert finding in check.finding
        assert mend in (check.mend or "")
        assert check.details["direct_reads"] is direct


def test_a_filesystem_that_nobody_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "filesystem_of", lambda path: None)
    check = doctor_disks.check_offload_folder(tmp_path)
    assert check.status is Status.OK
    assert "unknown filesystem" in check.finding


def test_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint()
    check = doctor_disks.check_checkpoint(checkpoint)
    assert (check.status, check.mend) == (Status.OK, None)
    assert check.finding == f"{checkpoint.path}: ext4, reads 1.50 GB/s"
    assert check.details["sparse_files"] == []
    monkeypatch.setattr(disks, "is_sparse", lambda file: True)
    check = doctor_disks.check_checkpoint(checkpoint)
    assert check.status is Status.WARN
    assert "model.safetensors has holes" in check.finding
    assert "download" in (check.mend or "")
    assert check.details["sparse_files"] == ["model.safetensors"]


def test_refusing_direct_reads_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not doctor_disks._reads_directly(Path("/proc/self/status"))


def test_the_filesystem_is_that_of_the_nearest_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert disks.filesystem_of(Path("/proc/self")) == "proc"
    table = "\n".join(
        [
            "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw",
            r"23 22 0:40 / /mnt/my\040disk rw - xfs /dev/sdb1 rw",
            "24 22 0:41 / /mnt/my rw - nfs4 server:/x rw",
            "25 24 0:42 / /mnt/my rw - btrfs /dev/sdc1 rw",
        ]
    )
    monkeypatch.setattr(Path, "read_text", lambda self: table)
    assert disks.filesystem_of(Path("/mnt/my disk/a")) == "xfs"
    assert disks.filesystem_of(Path("/mnt/my/a")) == "btrfs"
    assert disks.filesystem_of(Path("/mnt/mine")) == "ext4"
