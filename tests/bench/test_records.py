"""Records of real measurements are valid in every format; comparison; the runner's order of things."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from switchrun.bench import runner
from switchrun.bench.child_process import ChildError
from switchrun.bench.measure import measure
from switchrun.bench.records import SPARSE, compare, read_records
from switchrun.bench.runner import Bench, Cell
from switchrun.bench.synthetic import _note
from switchrun.checkpoint import open_checkpoint
from switchrun.errors import UsageError
from switchrun.output.bench_report import render_page
from switchrun.output.measurement_tables import BenchFormat, format_records
from tests.conftest import validate


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run children in this process; gives their names, in order."""
    seen: list[str] = []

    def run_child(module: str, task: dict[str, Any], **_: Any) -> Any:
        seen.append(task["work"])
        if task["batch_size"] == 7:
            raise ChildError("crashed", "do better")
        return json.loads(json.dumps(measure(task)))

    monkeypatch.setattr(runner, "run_child", run_child)
    return seen


def bench(cell: Cell, tmp_path: Path, **options: Any) -> Bench:
    return Bench(open_checkpoint(cell.model), tmp_path / "offload", options.get("synthetic"), lambda _: None)


def test_every_format_of_real_records(cell: Cell, calls: list[str], tmp_path: Path) -> None:
    cells = [replace(cell, batch_size=7), cell]
    records = list(bench(cell, tmp_path).run(cells))[::-1]
    # A crash does not keep the others from running.
    assert calls == ["measure"] * 3
    assert [record["status"] for record in records] == ["ok", "failed"]
    assert len(records[0]["metrics"]["fill_seconds"]["samples"]) == 2

    document = json.loads(format_records(records, BenchFormat.JSON))
    validate(document, "bench")
    for line in format_records(records, BenchFormat.JSONL).splitlines():
        validate(json.loads(line), "bench")
    rows = list(csv.DictReader(io.StringIO(format_records(records, BenchFormat.CSV))))
    assert [row["batch_size"] for row in rows] == ["1", "7"]
    assert float(rows[0]["fill_seconds.median"]) > 0
    assert rows[1]["error"] == "crashed"
    markdown = format_records(records, BenchFormat.MD)
    assert "| time to first token |" in markdown
    assert "Cell 2 failed: crashed (do better)" in format_records(records, BenchFormat.TABLE).splitlines()
    page = render_page(records)
    assert "time to first token" in page
    assert "<strong>Cell 2 failed</strong>" in page

    pytest.importorskip("matplotlib")
    from switchrun.output.bench_plot import draw

    for name in ("plot.png", "plot.svg"):
        draw(records, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_names_are_shown_and_not_obeyed(cell: Cell, calls: list[str], tmp_path: Path) -> None:
    (record,) = bench(cell, tmp_path).run([cell])
    record["knobs"]["model"] = "\x1b[31m[red]|\u202e\n$\\x$"
    for style in BenchFormat:
        text = format_records([record, record], style)
        assert not set(text) & set("\x1b\u202e")
        assert "[31m" in text
        assert style is BenchFormat.CSV or "[red]" in text
    lines = [line for line in format_records([record], BenchFormat.MD).splitlines() if "[red]" in line]
    assert lines == [r"| model | \x1b[31m[red]\|\u202e $\x$ |"]
    assert not set(render_page([record])) & set("\x1b\u202e")


def test_a_warm_cell_runs_once_and_drops_its_warmup(cell: Cell, calls: list[str], tmp_path: Path) -> None:
    (record,) = bench(cell, tmp_path).run([replace(cell, cache="warm", warmup=1)])
    assert calls == ["measure"]
    assert len(record["metrics"]["fill_seconds"]["samples"]) == 2
    assert len(record["metrics"]["open_seconds"]["samples"]) == 1
    validate(record, "bench")


def test_cold_warmup_processes_are_thrown_away(cell: Cell, calls: list[str], tmp_path: Path) -> None:
    (record,) = bench(cell, tmp_path).run([replace(cell, warmup=1, repeats=1)])
    assert calls == ["measure", "measure"]
    assert len(record["metrics"]["open_seconds"]["samples"]) == 1


def test_finished_cells_are_not_run_again(cell: Cell, calls: list[str], tmp_path: Path) -> None:
    cells = [replace(cell, repeats=1), replace(cell, repeats=1, seed=9)]
    first = list(bench(cell, tmp_path).run(cells[:1]))
    file = tmp_path / "records.jsonl"
    file.write_text(format_records(first, BenchFormat.JSONL))
    both = list(bench(cell, tmp_path).run(cells, read_records(file)))
    assert both[0] == read_records(file)[0]
    assert calls == ["measure", "measure"]


def test_synthetic_weights_are_named_everywhere(cell: Cell, calls: list[str], tmp_path: Path) -> None:
    description = {"geometry": "g", "num_experts": 4, "materialized_experts": 0, "note": "the weights are synthetic"}
    records = list(bench(cell, tmp_path, synthetic=description).run([replace(cell, repeats=1)]))
    validate(records[0], "bench")
    for style in BenchFormat:
        assert "the weights are synthetic" in format_records(records, style)


def test_sparse_files_are_warned_of(
    cell: Cell, calls: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they are made up or an incomplete download: what is read there takes no time."""
    told: list[str] = []
    description = {"geometry": "g", "num_experts": 4, "materialized_experts": 0, "note": _note(0, 4)}
    for synthetic in (None, description):
        monkeypatch.setattr("switchrun.machine.disks.is_sparse", lambda path: path.suffix == ".safetensors")
        with_holes = Bench(open_checkpoint(cell.model), tmp_path / "offload", synthetic, told.append)
        (record,) = with_holes.run([replace(cell, repeats=1)])
        assert SPARSE in record["notes"][0]
        assert told[0] == f"warning: {record['notes'][0]}"
        assert "cannot be said" in format_records([record], BenchFormat.TABLE).splitlines()[-1]
        told.clear()


def test_comparison_is_new_by_old(cell: Cell, calls: list[str], tmp_path: Path) -> None:
    (record,) = bench(cell, tmp_path).run([replace(cell, repeats=1)])
    old = json.loads(json.dumps(record))
    old["metrics"]["fill_seconds"]["median"] *= 4
    old["knobs"]["repeats"] = 5
    (compared,) = compare([record], [old], "old.json")
    assert compared["comparison"]["ratios"]["fill_seconds"] == pytest.approx(0.25)
    assert compared["comparison"]["ratios"]["load_bytes"] == 1
    validate(compared, "bench")
    assert "Now ÷ old.json" in format_records([compared], BenchFormat.TABLE)
    old["knobs"]["seed"] = 77
    assert compare([record], [old], "old.json") == [record]


@pytest.mark.parametrize("text", ["", "no json", '{"a": 1}', "[]", "{\n"])
def test_files_without_records_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    if not text:
        assert read_records(tmp_path / "file") == []
        return
    with pytest.raises(UsageError, match="holds no records"):
        read_records(tmp_path / "file")


def test_records_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text('{"schema_version": 1, "status": "ok", "knobs": {}}\n')
    with pytest.raises(UsageError, match="was written by another version"):
        read_records(tmp_path / "old.jsonl")
