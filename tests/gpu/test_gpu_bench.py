"""A benchmark on a GPU: what is counted there, and memory that runs out is the end of one cell, with the reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from switchrun.bench import runner
from switchrun.bench.child_process import ChildError
from switchrun.bench.measure import make_inputs, measure
from switchrun.bench.probe import Probe
from switchrun.bench.runner import Bench, Cell
from switchrun.checkpoint import open_checkpoint
from switchrun.errors import BudgetError
from switchrun.output.measurement_tables import BenchFormat, format_records
from tests.bench.conftest import cell, leave_the_page_cache_alone, tiny
from tests.conftest import validate
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.fake_accelerator import Device, fake_gpus
from tests.support.gpu_sessions import open_on_gpus
from tests.support.sessions import small_process

__all__ = ["cell", "leave_the_page_cache_alone", "small_process", "tiny"]
pytestmark = pytest.mark.usefixtures("small_process")


@pytest.fixture
def gpu() -> Iterator[Device]:
    with fake_gpus(None) as (device,):
        yield device


def test_what_is_measured_on_a_gpu(cell: Cell, gpu: Device) -> None:
    with open_on_gpus(save_tiny_tokenizer(Path(cell.model)), {"": 0}, 3) as session, Probe(session.engine) as probe:
        rows = make_inputs(session.checkpoint.config, 1, 6, seed=3)
        measured = probe.fill(rows, 4)
        gpus = [measured.stages[stage].gpus for stage in ("encoder", "decoder")]
        assert all(each.requests > 0 for each in gpus)
        assert measured.peak_gpu_bytes == gpu.peak


def test_memory_that_runs_out_in_a_measured_fill(cell: Cell, gpu: Device) -> None:
    with open_on_gpus(save_tiny_tokenizer(Path(cell.model)), {"": 0}, 3) as session, Probe(session.engine) as probe:
        rows = make_inputs(session.checkpoint.config, 1, 6, seed=3)
        gpu.capacity = gpu.allocated  # not even the input's ids find room
        with pytest.raises(BudgetError, match="gpu:0 is out of memory"):
            probe.fill(rows, 4)


def test_a_cell_without_memory_has_its_error_and_the_next_goes_on(
    cell: Cell, gpu: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_child(module: str, task: dict[str, Any], **_: Any) -> Any:
        gpu.capacity = 4096 if task["batch_size"] == 2 else 1 << 40
        try:
            return measure(task)
        except BudgetError as error:
            raise ChildError(error.message, error.hint, error.kind, error.exit_code) from None

    monkeypatch.setattr(runner, "run_child", run_child)
    cell = replace(cell, gpu_memory="1GiB", repeats=1, warmup=0)
    cells = [cell, replace(cell, batch_size=2), replace(cell, batch_size=3)]
    bench = Bench(open_checkpoint(cell.model), tmp_path / "offload", None, lambda _: None)
    records = list(bench.run(cells))
    assert [record["status"] for record in records] == ["ok", "failed", "ok"]
    error = records[1]["error"]
    assert (error["kind"], error["exit_code"]) == ("budget", 6)
    assert error["message"].startswith("gpu:0 is out of memory: of the 1 GiB that are allowed, switchrun has ")
    assert error["hint"].startswith("try --gpu-memory ")
    assert records[2]["metrics"]["gpu_hit_rate"]["median"] > 0
    validate(json.loads(format_records(records, BenchFormat.JSON)), "bench")
