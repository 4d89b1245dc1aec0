"""Open files: few of them, and none that is read is closed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from switchrun.errors import CorruptCheckpointError
from switchrun.experts import reader
from switchrun.experts.reader import OpenFile, OpenFiles


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    result = [tmp_path / f"{number}" for number in range(6)]
    for path in result:
        path.write_text(path.name)
    return result


def content(file: OpenFile) -> str:
    return os.pread(file.descriptor, 10, 0).decode()


def is_open(file: OpenFile) -> bool:
    try:
        os.fstat(file.descriptor)
    except OSError:
        return False
    return True


def test_idle_files_are_closed_oldest_first(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MOST_OPEN_FILES", 3)
    files = OpenFiles()
    used = files.acquire(paths[0], direct=False)
    others = []
    for path in paths[1:]:
        others.append(files.acquire(path, direct=False))
        files.release(others[-1])
    assert len(files._files) == 3
    assert set(files._files) == {paths[0], *paths[-2:]}
    assert content(used) == "0"
    files.release(used)
    files.close()
    assert not any(is_open(file) for file in [used, *others] if file.retired is False)
    assert not files._files


def test_a_forgotten_file_lives_as_long_as_it_is_read(paths: list[Path]) -> None:
    files = OpenFiles()
    old = files.acquire(paths[0], direct=False)
    paths[0].unlink()
    paths[0].write_text("new")
    assert files.acquire(paths[0], direct=False) is old
    files.release(old)
    files.forget(paths[0])
    new = files.acquire(paths[0], direct=False)
    assert (content(old), content(new)) == ("0", "new")
    descriptor = old.descriptor
    files.release(old)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    files.release(new)
    files.forget(paths[1])  # which nobody has opened
    files.close()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    files = OpenFiles()
    with pytest.raises(CorruptCheckpointError, match="cannot open"):
        files.acquire(tmp_path / "nothing", direct=True)
    assert not files.all_direct


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, direct: bool) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, what in (("fifo", "a FIFO"), ("zero", "a device")):
        with pytest.raises(CorruptCheckpointError, match=f"it is {what}, not a file"):
            OpenFiles().acquire(tmp_path / name, direct)
