"""Which folder switchrun writes to when nobody names one."""

from __future__ import annotations

from pathlib import Path

import pytest

from switchrun.machine.folders import cache_folder, offload_folder

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
    from switchrun.checkpoint import open_checkpoint

    HERE.mkdir()
    open_checkpoint(cache_dir=offload_folder(None) / "index")
    assert list(HERE.iterdir())
    assert offload_folder(None) == HERE
