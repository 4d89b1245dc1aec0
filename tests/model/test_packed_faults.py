"""A session whose offload folder lies on a disk that is full, read-only or in use by others, or is another model's."""

from __future__ import annotations

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
from tests.support.sessions import small_process
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
