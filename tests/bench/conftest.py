"""Real answers of the measuring code, over a tiny checkpoint and in the test's own process."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from switchrun.bench import raw_disk
from switchrun.bench.runner import Cell
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config


@pytest.fixture(autouse=True)
def leave_the_page_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_disk, "DROP_CACHES", tmp_path / "nowhere" / "drop_caches")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return save_checkpoint(random_model(tiny_config()), tmp_path / "tiny")


@pytest.fixture
def cell(tiny: Path) -> Cell:
    return Cell(str(tiny), cpu_memory_bytes=4 * 1024**3, input_tokens=6, output_tokens=4, repeats=2)


def task_of(cell: Cell, offload: Path, **more: Any) -> dict[str, Any]:
    return asdict(cell) | {"offload_folder": str(offload), "fills": 1} | more
