"""What is measured is what happens: same tokens, every read seen, computing apart from reading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from switchrun.bench import baseline
from switchrun.bench import cell as cell_process
from switchrun.bench.cells import Cell
from switchrun.bench.measure import Probe, used_experts
from switchrun.bench.replay import Range, Ring, replay
from switchrun.bench.workload import make_inputs
from switchrun.checkpoint.types import ExpertKey
from switchrun.experts.ways import WAYS
from switchrun.model.engine import Engine
from switchrun.planning.opening import plan_model
from switchrun.planning.options import OpenOptions
from tests.bench.conftest import task_of


def test_a_cold_cell(cell: Cell, tmp_path: Path) -> None:
    answer = cell_process.measure(task_of(cell, tmp_path))
    (fill,) = answer["fills"]
    counters = [fill["stages"][stage]["counters"] for stage in ("encoder", "decoder")]
    assert [len(row) for row in fill["output_ids"]] == [1 + cell.output_tokens]
    assert len(fill["token_seconds"]) == cell.output_tokens
    used = sum(len(experts) for experts in fill["expert_use"].values())
    assert sum(each["loads"] for each in counters) == used
    # One decoder layer asks for one expert in each step.
    assert sum(fill["expert_use"]["decoder.1"].values()) == cell.output_tokens == counters[1]["requests"]
    assert fill["second_pass"]["output_ids"] == fill["output_ids"]
    assert fill["second_pass"]["stages"]["encoder"]["counters"]["loads"] == counters[0]["loads"]
    without_reads = fill["compute"]["stages"]
    assert all(without_reads[stage]["counters"]["requests"] == 0 for stage in without_reads)
    assert fill["seconds"] >= sum(stage["expert_layer_seconds"] for stage in fill["stages"].values())
    assert answer["timeline"]
    assert answer["warnings"] == []


def test_the_stores_warnings_are_in_the_answer(cell: Cell, tmp_path: Path) -> None:
    offload = tmp_path / "a file"
    offload.write_text("")
    answer = cell_process.measure(task_of(replace(cell, dtype="int8"), tmp_path, offload_folder=str(offload)))
    assert len(answer["warnings"]) == 1
    assert "cannot be written" in answer["warnings"][0]


def test_a_warm_cell_keeps_its_experts(cell: Cell, tmp_path: Path) -> None:
    answer = cell_process.measure(task_of(replace(cell, cache="warm", batch_size=2), tmp_path, fills=3))
    requests = [sum(fill["stages"][s]["counters"]["loads"] for s in fill["stages"]) for fill in answer["fills"]]
    assert requests[0] > 0
    assert sum(requests) <= 8
    assert all(fill["second_pass"] is None for fill in answer["fills"])


def test_plain_transformers_generates_the_same(cell: Cell, tmp_path: Path) -> None:
    ours = cell_process.measure(task_of(cell, tmp_path))
    plan = ours["plan"]
    more = {"path": cell.model, "torch_dtype": "float32", "cpu_budget_bytes": plan["cpu_budget_bytes"]}
    theirs = baseline.measure(task_of(cell, tmp_path, **more, scratch=str(tmp_path / "scratch")))
    assert theirs["fills"][0]["output_ids"] == ours["fills"][0]["output_ids"]


def test_forced_routing_is_that_of_the_fill_before(cell: Cell) -> None:
    prepared = plan_model(OpenOptions(model=cell.model, cpu_memory=cell.cpu_memory_bytes))
    rows = make_inputs(prepared.checkpoint.config, 2, 6, seed=3)
    with Engine(prepared) as engine, Probe(engine) as probe:
        probe.fill(rows, 4)
        # What the experts are given, token by token, before and after.
        seen: list[torch.Tensor] = []
        for module in probe._layers:
            module.register_forward_pre_hook(lambda _, args: seen.append(args[1].argmax(-1)))
        first = probe.fill(rows, 4)
        with_reads, seen[:] = list(seen), []
        probe.compute_only(rows, 4)
        assert len(seen) == len(with_reads) == 5
        assert all(torch.equal(one, two) for one, two in zip(with_reads, seen, strict=True))
        assert probe.fill(rows, 4).output_ids == first.output_ids


def test_inputs_are_exact_and_from_the_seed() -> None:
    config = {"vocab_size": 32128, "eos_token_id": 1}
    rows = make_inputs(config, 3, 24, seed=1)
    assert [len(row) for row in rows] == [24] * 3
    assert all(row[-1] == 1 and all(3 <= token < 32000 for token in row[:-1]) for row in rows)
    assert make_inputs(config, 2, 24, seed=1) == rows[:2]
    assert make_inputs(config, 3, 24, seed=2) != rows


def test_used_experts_are_in_order() -> None:
    use = {ExpertKey("decoder", 1, 0): 1, ExpertKey("encoder", 3, 10): 2, ExpertKey("encoder", 3, 9): 3}
    assert str(used_experts(use)) == "{'encoder.3': {'9': 3, '10': 2}, 'decoder.1': {'0': 1}}"


def test_replays_read_what_they_are_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(300_000))
    ring = Ring()
    for way in WAYS:
        rate = replay([Range(file, 5, 100_000), Range(file, 250_000, 50_000)], way, ring)
        assert rate is None or rate > 0
    assert replay([], WAYS[0], ring) is None
    assert replay([Range(file, 0, 300_000)], WAYS[-1], ring)
    ring.close()
