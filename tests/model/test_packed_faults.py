"""A session whose offload folder lies on a disk that is full, read-only or in use by others, or is another model's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from switchrun import GenerationOptions, Session
from switchrun.errors import CorruptCheckpointError
from switchrun.store import list_stores, store_folder, verify_store
from tests.store.conftest import Mount, tmpfs
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.sessions import open_with_slots, small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process", "tmpfs"]

TEXTS = ["the <extra_id_0> sat on the <extra_id_1> .", "<extra_id_0> and salt , <extra_id_1> with the red cat"]


@pytest.fixture
def model(tmp_path: Path, small_process: None) -> Path:
    spec = CheckpointSpec()
    spec.save(spec.model(), tmp_path / "model")
    save_tiny_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def fill(model: Path, offload: Path) -> list[str]:
    with Session.open(model, dtype="int8", batch_size=2, offload_folder=offload) as session:
        return [result.raw for result in session.fill(TEXTS, GenerationOptions(max_new_tokens=8))]


def check_one_warning(caplog: pytest.LogCaptureFixture, reason: str) -> None:
    (record,) = caplog.records
    assert record.message.endswith(f"cannot be written: {reason}; no more experts are stored there")
    caplog.clear()


def stored(offload: Path) -> int:
    (info,) = list_stores(offload)
    assert verify_store(info.folder).damaged == ()
    return info.experts


def test_a_full_disk(model: Path, tmp_path: Path, tmpfs: Mount, caplog: pytest.LogCaptureFixture) -> None:
    expected = fill(model, tmp_path / "room")
    disk = tmpfs("size=40k")
    for _ in range(2):
        assert fill(model, disk) == expected
        check_one_warning(caplog, "No space left on device")
        assert 0 < stored(disk) < stored(tmp_path / "room")
    tmpfs("remount,size=4m", again=disk)
    assert fill(model, disk) == expected
    assert not caplog.records
    assert stored(disk) == stored(tmp_path / "room")


def test_a_read_only_disk(model: Path, tmp_path: Path, tmpfs: Mount, caplog: pytest.LogCaptureFixture) -> None:
    expected = fill(model, tmp_path / "room")
    disk = tmpfs("size=4m")
    fill(model, disk)
    first, *others = sorted(disk.rglob("*.safetensors"))
    first.unlink()
    tmpfs("remount,ro", again=disk)
    assert fill(model, disk) == expected
    check_one_warning(caplog, "Read-only file system")
    assert stored(disk) == len(others)


def damage(path: Path) -> None:
    """Overwrite an expert's data in place, as a failing disk may; name, size and header stay."""
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"\x5a" * (path.stat().st_size - 4096))


def test_experts_that_are_damaged_between_two_reads(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One slot: an expert that has been read and verified is read again for the next token."""
    options = GenerationOptions(max_new_tokens=8)
    with open_with_slots(model, 1, dtype="int8", batch_size=2, offload_folder=tmp_path / "tier") as session:
        expected = [result.raw for result in session.fill(TEXTS, options)]
    files = sorted((tmp_path / "tier").rglob("*.safetensors"))
    with open_with_slots(model, 1, dtype="int8", batch_size=2, offload_folder=tmp_path / "tier") as session:
        assert [result.raw for result in session.fill(TEXTS, options)] == expected
        assert not caplog.records
        for path in files:
            damage(path)
        assert [result.raw for result in session.fill(TEXTS, options)] == expected
    told = sorted(record.message for record in caplog.records)
    reason = "is damaged: its bytes do not match its checksum; the expert is taken from the checkpoint again"
    assert told == sorted(f"{path} {reason}" for path in files)
    # What was packed again meanwhile is sound. The writer may have had no buffer free for some.
    assert stored(tmp_path / "tier") > 0


@pytest.mark.parametrize("kind", ["damaged", "FIFO", "link", "folder", "gone"])
def test_experts_that_are_no_good_from_the_start(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    expected = fill(model, tmp_path / "tier")
    outside = shutil.copytree(tmp_path / "tier", tmp_path / "outside")
    before = {path: path.read_bytes() for path in outside.rglob("*.safetensors")}
    for path in sorted((tmp_path / "tier").rglob("*.safetensors")):
        if kind == "damaged":
            damage(path)
            continue
        path.unlink()
        if kind == "FIFO":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(outside / path.relative_to(tmp_path / "tier"))
        elif kind == "folder":
            path.mkdir()
    assert fill(model, tmp_path / "tier") == expected
    assert bool(caplog.records) == (kind != "gone")
    assert all(record.levelname == "WARNING" for record in caplog.records)
    assert {path: path.read_bytes() for path in outside.rglob("*.safetensors")} == before


def test_a_folder_of_another_model(model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other")
    fill(other, tmp_path / "tier")
    mine = store_folder(tmp_path / "tier", str(model), "int8")
    store_folder(tmp_path / "tier", str(other), "int8").parent.rename(mine.parent)
    with pytest.raises(CorruptCheckpointError, match=f"it belongs to another model, {other}"):
        fill(model, tmp_path / "tier")


@pytest.mark.slow
def test_two_processes_fill_a_fresh_folder(tmp_path: Path, hermetic: dict[str, str]) -> None:
    command = [sys.executable, "-m", "switchrun", "fill", "--dtype", "int8", "--offload-folder", "tier", *TEXTS]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": hermetic}
    processes = [subprocess.Popen(command, cwd=tmp_path, **pipes) for _ in range(2)]
    first, second = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert first == second
    assert first[1] == b""
    assert stored(tmp_path / "tier") > 0
