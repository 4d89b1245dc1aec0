"""Disks: the offload folder as it is, as it may not be, and the checkpoint's files."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from switchrun.checkpoint import open_checkpoint
from switchrun.doctor import machine_checks
from switchrun.doctor.check import Check
from switchrun.machine import disks, folders
from switchrun.units import GIB, MIB

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def good_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast ext4 with room, whatever this machine has, and little to be written."""
    monkeypatch.setattr(disks, "filesystem_of", lambda path: "ext4")
    monkeypatch.setattr(disks, "measure_read_bandwidth", lambda ranges: 1.5e9 if sum(r[2] for r in ranges) else None)
    monkeypatch.setattr(machine_checks, "_SAMPLE_BYTES", MIB)
    set_free(monkeypatch, 50 * GIB)


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GIB, 100 * GIB - free, free))


def test_a_good_folder(tmp_path: Path) -> None:
    check = machine_checks.check_offload_folder(tmp_path)
    assert (check.status, check.hint, check.exit_code) == ("ok", None, 0)
    assert check.finding == f"{tmp_path}: ext4, 50 GiB free, reads 1.50 GB/s"
    assert check.details == {
        "path": str(tmp_path),
        "filesystem": "ext4",
        "free_bytes": 50 * GIB,
        "read_bytes_per_second": 1.5e9,
    }


def test_what_is_written_is_read_and_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def measure(ranges: list[Any]) -> float:
        [(path, offset, length)] = ranges
        seen.append((offset, length, path.stat().st_size, len(path.read_bytes()), sorted(folder.iterdir())))
        return 1e9

    folder = tmp_path / "tier"
    folder.mkdir()
    monkeypatch.setattr(disks, "measure_read_bandwidth", measure)
    assert machine_checks.check_offload_folder(folder).status == "ok"
    size = 8 * MIB
    assert seen == [(0, size, size, size, [])]
    assert list(folder.iterdir()) == []


def test_no_more_is_written_than_a_tenth_of_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 0)
    check = machine_checks.check_offload_folder(tmp_path)
    assert check.status == "warn"
    assert check.details["read_bytes_per_second"] is None
    assert "little room" in check.finding
    assert "make room" in (check.hint or "")


def test_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    check = machine_checks.check_offload_folder(folder)
    assert check.status == "ok"
    assert check.finding.startswith(f"{folder}: ext4")
    assert not folder.parent.exists()
    assert machine_checks.check_offload_folder(Path("relative")).status == "ok"


def fails_as_unwritable(check: Check) -> bool:
    assert "--offload-folder" in (check.hint or "")
    return check.status == "fail" and check.exit_code == 9 and "cannot be written" in check.finding


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    assert fails_as_unwritable(machine_checks.check_offload_folder(tmp_path / "file"))
    assert fails_as_unwritable(machine_checks.check_offload_folder(tmp_path / "file" / "tier"))
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    assert fails_as_unwritable(machine_checks.check_offload_folder(tmp_path / "broken"))
    # Nobody writes there, not even root, as whom tests may run.
    check = machine_checks.check_offload_folder(Path("/proc/self/tier"))
    assert fails_as_unwritable(check)
    assert check.details == {"path": "/proc/self/tier"}

    def refuse(**_: object) -> None:
        raise PermissionError(13, os.strerror(13))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    assert machine_checks.check_offload_folder(tmp_path).finding == f"{tmp_path} cannot be written: Permission denied"


def test_one_that_nobody_named_is_a_comfort() -> None:
    check = machine_checks.check_offload_folder(Path("/proc/self/tier"), named=False)
    assert (check.status, check.exit_code) == ("warn", 0)
    assert "cannot be written" in check.finding
    check = machine_checks.check_offload_folder(folders.NOWHERE / "offload", named=False)
    assert (check.status, check.exit_code) == ("warn", 0)
    assert check.finding.startswith("there is no home folder")
    assert "--offload-folder" in (check.hint or "")


@pytest.mark.parametrize(
    ("filesystem", "rate", "finding", "hint"),
    [
        ("nfs4", 1e9, "network", "local disk"),
        ("fuse.sshfs", None, "network", "local disk"),
        ("tmpfs", 5e9, "it is memory", "on a disk"),
        ("zfs", None, "refuses O_DIRECT", "ext4"),
        ("ext4", 0.12e9, "reads 0.12 GB/s; that is slow", "of a model in 16 bits, --dtype int8"),
    ],
)
def test_what_a_disk_can_be(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    filesystem: str,
    rate: float | None,
    finding: str,
    hint: str,
) -> None:
    monkeypatch.setattr(disks, "filesystem_of", lambda path: filesystem)
    monkeypatch.setattr(disks, "measure_read_bandwidth", lambda ranges: rate)
    for check in (machine_checks.check_offload_folder(tmp_path), machine_checks.check_checkpoint(open_checkpoint())):
        assert (check.status, check.exit_code) == ("warn", 0)
        assert finding in check.finding
        assert hint in (check.hint or "")


def test_a_filesystem_that_nobody_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "filesystem_of", lambda path: None)
    check = machine_checks.check_offload_folder(tmp_path)
    assert check.status == "ok"
    assert "unknown filesystem" in check.finding


def test_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint()
    check = machine_checks.check_checkpoint(checkpoint)
    assert (check.status, check.hint) == ("ok", None)
    assert check.finding == f"{checkpoint.path}: ext4, reads 1.50 GB/s"
    assert check.details["sparse_files"] == []
    monkeypatch.setattr(disks, "is_sparse", lambda file: True)
    check = machine_checks.check_checkpoint(checkpoint)
    assert check.status == "warn"
    assert "model.safetensors has holes" in check.finding
    assert "download" in (check.hint or "")
    assert check.details["sparse_files"] == ["model.safetensors"]


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
    monkeypatch.setattr(Path, "read_bytes", lambda self: table.encode())
    assert disks.filesystem_of(Path("/mnt/my disk/a")) == "xfs"
    assert disks.filesystem_of(Path("/mnt/my/a")) == "btrfs"
    assert disks.filesystem_of(Path("/mnt/mine")) == "ext4"
