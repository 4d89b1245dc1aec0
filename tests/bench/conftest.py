"""Real answers of the measuring code, over a tiny checkpoint and in the test's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from switchrun.bench import page_cache
from switchrun.bench.cells import Cell
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config


@pytest.fixture(autouse=True)
def leave_the_page_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "DROP_CACHES", tmp_path / "nowhere" / "drop_caches")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_checkpoint(random_model(tiny_config()), tmp_path / "tiny")


@pytest.fixture
def cell(tiny: Path) -> Cell:
    return Cell(str(tiny), cpu_memory_bytes=4 * 1024**3, input_tokens=6, output_tokens=4, repeats=2)


def task_of(cell: Cell, offload: Path, **more: Any) -> dict[str, Any]:
    task = {"offload_folder": str(offload), "fills": 1, "cold": cell.cache == "cold", "turn": 0}
    return cell.knobs() | task | more
