"""`switchrun bench`: options, files, failures and signals; and once the real thing."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from switchrun.bench import raw_disk, runner
from switchrun.bench.child_process import ChildError
from switchrun.cli.signals import Interrupted
from tests.cli.conftest import Invoke
from tests.conftest import RunSwitchrun, validate

STAGE = {
    "seconds": 2.0,
    "expert_layer_seconds": 1.5,
    "counters": {
        "requests": 4, "hits": 1, "loads": 3, "load_bytes": 3000, "load_seconds": 0.5, "wait_seconds": 1.0,
        "hub_loads": 0, "hub_bytes": 0,
    },
    "gpus": {
        "requests": 0, "hits": 0, "loads": 0, "load_bytes": 0, "load_seconds": 0.0, "wait_seconds": 0.0,
        "hub_loads": 0, "hub_bytes": 0,
    },
}  # fmt: skip
FILL = {
    "seconds": 4.0,
    "token_seconds": [2.0, 3.0, 4.0],
    "stages": {"encoder": STAGE, "decoder": STAGE},
    "output_ids": [[0, 5, 6, 7]],
    "io_read_bytes": 6000,
    "hub": None,
    "peak_rss_bytes": 10**9,
    "peak_gpu_bytes": None,
}
WAY = {"threads": 1, "chunk_bytes": 4096, "direct": True, "encoder": 2000.0, "decoder": 3000.0}
PLAN = {
    "dtype": "bf16", "stored_dtype": "BF16", "num_experts": 8, "experts_per_layer": 4, "expert_bytes": 1000,
    "total_bytes": 9000, "expert_slots": 4, "slot_bytes": 1000, "dense_bytes": 1000, "cpu_budget_bytes": 10**9,
    "repairs": [],
}  # fmt: skip


def answer() -> dict[str, Any]:
    fill = FILL | {
        "raw": [WAY, WAY | {"direct": False, "encoder": 4000.0, "decoder": None}],
        "expert_use": {"encoder.1": {"0": 1, "3": 1}, "decoder.1": {"2": 3}},
    }
    return {
        "open_seconds": 1.0, "open_io_read_bytes": 1000, "plan": PLAN, "fills": [fill], "timeline": [[0.1, 10**6]],
        "warnings": [], "open_hub": None,
    }  # fmt: skip


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """Answer without a process; gives the tasks. Batch size 6 fails, 7 is Ctrl-C."""
    tasks: list[dict[str, Any]] = []

    def run_child(module: str, task: dict[str, Any], **_: Any) -> Any:
        tasks.append(task)
        if task["batch_size"] == 6:
            raise ChildError("it needs more", "give more", "budget", 6)
        if task["batch_size"] == 7:
            raise Interrupted(signal.SIGINT)
        return answer()

    monkeypatch.setattr(runner, "run_child", run_child)
    monkeypatch.setattr(raw_disk, "DROP_CACHES", tmp_path / "nowhere" / "drop_caches")
    monkeypatch.chdir(tmp_path)
    return tasks


def test_lists_make_cells(invoke: Invoke, children: list[dict[str, Any]]) -> None:
    done = invoke(*"bench --dtype bf16,fp32 --cpu-memory 1GiB,2GiB --batch-size 1,8 --repeats 1 --format jsonl".split())
    assert done.code == 0
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(children) == len(records) == 8
    knobs = [(r["knobs"]["dtype"], r["knobs"]["cpu_memory_bytes"], r["knobs"]["batch_size"]) for r in records]
    assert knobs[:3] == [("bf16", 2**30, 1), ("bf16", 2**30, 8), ("bf16", 2**31, 1)]
    for record in records:
        validate(record, "bench")
    assert "cell 8 of 8" in done.stderr


def test_what_came_from_the_hub(
    invoke: Invoke, children: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = answer()
    stage = STAGE | {"counters": STAGE["counters"] | {"hub_loads": 2, "hub_bytes": 2000}}  # type: ignore[operator]
    hub = {"bytes": 4100, "requests": 9, "retries": 1}
    given["fills"][0] |= {"stages": {"encoder": stage, "decoder": stage}, "hub": hub}
    monkeypatch.setattr(
        runner, "run_child", lambda *_, **__: given | {"open_hub": {"bytes": 77, "requests": 3, "retries": 0}}
    )
    record = json.loads(invoke(*"bench --repeats 1 --hub ranges --format jsonl -q".split()).stdout)
    validate(record, "bench")
    assert record["knobs"]["hub"] == "ranges"
    names = ("open_hub_bytes", "hub_loads", "hub_bytes", "hub_requests", "hub_retries", "encoder_bytes_per_second")
    assert [record["metrics"][name]["median"] for name in names] == [77, 4, 4100, 9, 1, 500]
    table = invoke(*"bench --repeats 1 --format table -q".split()).stdout
    assert "requests to the Hub" in table
    monkeypatch.setattr(runner, "run_child", lambda *_, **__: answer())
    assert "Hub" not in invoke(*"bench --repeats 1 --format table -q".split()).stdout


def test_the_arithmetic_of_a_record(invoke: Invoke, children: list[dict[str, Any]]) -> None:
    record = json.loads(invoke(*"bench --repeats 2 --output-tokens 3 --format jsonl -q".split()).stdout)
    median = {name: summary and summary["median"] for name, summary in record["metrics"].items()}
    assert median["ttft_seconds"] == 2
    assert median["itl_seconds"] == 1
    assert median["decoder_tokens_per_second"] == 1.5
    assert median["hit_rate"] == 0.25
    assert median["distinct_expert_bytes"] == 3000
    assert (median["wait_seconds"], median["expert_seconds"], median["dense_seconds"]) == (2, 1, 1)
    assert median["encoder_ratio"] == 1500 / 4000
    assert median["decoder_ratio"] == 1500 / 3000
    assert (median["encoder_raw_bytes_per_second"], median["decoder_raw_bytes_per_second"]) == (4000, 3000)


def test_warnings_of_the_store_are_told_and_recorded(
    invoke: Invoke, children: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "run_child", lambda *_, **__: answer() | {"warnings": ["tier cannot be written"]})
    done = invoke(*"bench --repeats 2 --format jsonl".split())
    assert done.stderr.count("switchrun: warning: cell 1 of 1: tier cannot be written\n") == 2
    assert json.loads(done.stdout)["notes"].count("tier cannot be written") == 1
    assert "tier cannot be written" in invoke(*"bench --repeats 1 -q".split()).stdout


def test_a_failed_cell_does_not_end_the_run(invoke: Invoke, children: list[dict[str, Any]]) -> None:
    done = invoke(*"bench --batch-size 6,1 --repeats 1 --format json -q".split())
    assert (done.code, done.stderr) == (3, "")
    document = json.loads(done.stdout)
    validate(document, "bench")
    assert [record["status"] for record in document["cells"]] == ["failed", "ok"]
    assert invoke(*"bench --batch-size 6 --repeats 1".split()).code == 6


def test_the_summary_is_printed_last(invoke: Invoke, children: list[dict[str, Any]], tmp_path: Path) -> None:
    """With what failed below it; the page has both too, and needs no extra."""
    done = invoke(*"bench --batch-size 1,6 --repeats 1 --report page.html".split())
    *_, failed, empty, last = done.stdout.splitlines()
    assert (failed, empty) == ("Cell 2 failed: it needs more (give more)", "")
    limit = "The disk limits: 50 % of a fill was waiting for it. int8 would read 50 % of the bytes."
    assert last == f"{limit} 1 cell of 2 failed."
    assert done.stdout.index("Summary") > done.stdout.index("Measured in cell 1")
    page = (tmp_path / "page.html").read_text().replace("&nbsp;", " ")
    assert last in page
    assert "it needs more (give more)" in page


def test_ctrl_c_keeps_finished_cells_and_resume_goes_on(
    invoke: Invoke, children: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal, export = tmp_path / "cells.jsonl", tmp_path / "all.csv"
    options = f"--repeats 1 --format jsonl -q --resume {journal} --export {export}".split()
    with pytest.raises(Interrupted) as caught:
        invoke("bench", "--batch-size", "1,7", *options)
    assert caught.value.exit_code == 130
    assert len(journal.read_text().splitlines()) == 1
    assert len(export.read_text().splitlines()) == 2
    assert len(children) == 2
    done = invoke("bench", "--batch-size", "1,8", *options)
    assert len(done.stdout.splitlines()) == 2
    assert [task["batch_size"] for task in children[2:]] == [8]
    assert len(journal.read_text().splitlines()) == 2


def test_files_besides(invoke: Invoke, children: list[dict[str, Any]], tmp_path: Path) -> None:
    for ending in ("json", "jsonl", "csv", "md"):
        assert invoke(*f"bench --repeats 1 -q --export out.{ending}".split()).code == 0
        assert (tmp_path / f"out.{ending}").stat().st_size
    validate(json.loads((tmp_path / "out.json").read_text()), "bench")
    done = invoke(*"bench --repeats 1 -q --compare out.json".split())
    assert "Now ÷ out.json" in done.stdout
    assert "1.00 ×" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dtype bf16,bf16", "--dtype: 'bf16,bf16' is not a list"),
        ("--dtype bf17", "'bf17' is not a dtype"),
        ("--cpu-memory 1GiB,much", "--cpu-memory: 'much' is not a size"),
        ("--batch-size 1,0", "--batch-size: '0' is not a number above 0"),
        ("--materialize 1GiB", "--materialize does nothing without --synthetic"),
        ("--model . --synthetic base-8", "cannot be used together"),
        ("--export out.txt", "'out.txt' has an ending that is not known"),
        ("--plot no/such/folder.png", "there is no folder"),
        ("--compare nothing.json", "nothing.json cannot be read"),
    ],
)
def test_usage(invoke: Invoke, children: list[dict[str, Any]], options: str, message: str) -> None:
    done = invoke("bench", *options.split())
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert not children


def test_without_matplotlib_it_is_said_before_anything_is_measured(
    invoke: Invoke, children: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    done = invoke("bench", "--plot", "x.png")
    assert done.code == 2
    assert "pip install 'switchrun[plot]'" in done.stderr
    assert not children


@pytest.mark.slow
def test_the_demo_model(run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun("bench --warm --repeats 2 --output-tokens 3 --cpu-memory 2GiB --format json".split())
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    validate(document, "bench")
    assert document["cells"][0]["status"] == "ok"
