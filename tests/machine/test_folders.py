"""Which folder switchrun writes to when nobody names one."""

from __future__ import annotations

from pathlib import Path

import pytest

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.locate import locate
from switchrun.errors import ModelError, StorageError
from switchrun.machine import disks
from switchrun.machine.folders import NOWHERE, cache_folder, in_home, offload_folder, write_cache_file
from switchrun.store import open_checkpoint_store

HERE = Path("offload")


def test_without_a_folder_here_it_is_in_the_users_cache() -> None:
    assert offload_folder(None) == cache_folder() / "offload"
    HERE.write_text("a file")
    assert offload_folder(None) == cache_folder() / "offload"


def test_an_empty_one_is_taken() -> None:
    HERE.mkdir()
    assert offload_folder(None) == HERE


@pytest.mark.parametrize(
    "file",
    ["README.md", f"demo-{'0a' * 6}/int8/manifest.json", f"index/{'0a' * 16}.json"],
)
def test_one_of_ours_is_taken(file: str) -> None:
    (HERE / file).parent.mkdir(parents=True)
    (HERE / file).write_text("# the disk tier of switchrun")
    assert offload_folder(None) == HERE


@pytest.mark.parametrize(
    "file", ["README.md", "photos/a.jpg", "web/app/manifest.json", "index/page.json", "index.html", ".hidden"]
)
def test_one_of_somebody_elses_is_left_alone(file: str) -> None:
    (HERE / file).parent.mkdir(parents=True, exist_ok=True)
    (HERE / file).write_text("# somebody else's")
    assert offload_folder(None) == cache_folder() / "offload"
    assert offload_folder("offload") == HERE


def test_what_switchrun_itself_wrote_is_found_again() -> None:
    HERE.mkdir()
    open_checkpoint(cache_dir=offload_folder(None) / "index")
    assert list(HERE.iterdir())
    assert offload_folder(None) == HERE


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home, whom the system does not know."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "XDG_CACHE_HOME", "SWITCHRUN_CACHE"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.usefixtures("nobody")
def test_without_a_home_nothing_is_kept(tmp_path: Path) -> None:
    assert cache_folder() == NOWHERE
    assert offload_folder(None) == NOWHERE / "offload"
    write_cache_file(cache_folder() / "bandwidth.json", b"{}")
    assert disks.recall("bandwidth", tmp_path) is None
    assert in_home("~/models/x") == Path("~/models/x")
    assert locate(None).id == "demo"
    with pytest.raises(ModelError, match="no folder '~/models/x'"):
        locate("~/models/x")
    assert list(tmp_path.glob("*")) == [tmp_path / "home"]


@pytest.mark.usefixtures("nobody")
def test_prepare_says_how_to_name_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no-home-folder.* cannot be written") as caught:
        open_checkpoint_store(offload_folder(None), open_checkpoint(None), "int8", must_write=True)
    assert "--offload-folder" in caught.value.hint


def test_a_relative_cache_folder_counts_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SWITCHRUN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert cache_folder() == tmp_path / "home" / ".cache" / "switchrun"
    monkeypatch.setenv("HOME", "home")
    assert cache_folder() == NOWHERE
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_folder() == Path("/c/switchrun")
