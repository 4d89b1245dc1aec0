"""What is measured is what happens: same tokens, every read seen, computing apart from reading."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from switchrun.bench.measure import make_inputs, measure
from switchrun.bench.probe import used_experts
from switchrun.bench.raw_disk import replay, replay_all
from switchrun.bench.runner import Cell
from switchrun.checkpoint.types import ExpertKey
from switchrun.experts.reader import Segment, Way
from switchrun.experts.ways import WAYS
from tests.bench.conftest import task_of


def test_a_cold_cell(cell: Cell, tmp_path: Path) -> None:
    answer = measure(task_of(cell, tmp_path))
    (fill,) = answer["fills"]
    counters = [fill["stages"][stage]["counters"] for stage in ("encoder", "decoder")]
    assert [len(row) for row in fill["output_ids"]] == [1 + cell.output_tokens]
    assert len(fill["token_seconds"]) == cell.output_tokens
    used = sum(len(experts) for experts in fill["expert_use"].values())
    assert sum(each["loads"] for each in counters) == used
    # One decoder layer asks for one expert in each step.
    assert sum(fill["expert_use"]["decoder.1"].values()) == cell.output_tokens == counters[1]["requests"]
    assert fill["seconds"] >= sum(stage["expert_layer_seconds"] for stage in fill["stages"].values())
    assert answer["timeline"]
    assert answer["warnings"] == []


def test_the_stores_warnings_are_in_the_answer(cell: Cell, tmp_path: Path) -> None:
    offload = tmp_path / "a file"
    offload.write_text("")
    answer = measure(task_of(replace(cell, dtype="int8"), tmp_path, offload_folder=str(offload)))
    assert len(answer["warnings"]) == 1
    assert "cannot be written" in answer["warnings"][0]


def test_a_warm_cell_keeps_its_experts(cell: Cell, tmp_path: Path) -> None:
    answer = measure(task_of(replace(cell, cache="warm", batch_size=2), tmp_path, fills=3))
    requests = [sum(fill["stages"][s]["counters"]["loads"] for s in fill["stages"]) for fill in answer["fills"]]
    assert requests[0] > 0
    assert sum(requests) <= 8


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


def test_replays_read_what_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(300_000))
    read: list[tuple[int, int]] = []
    real = os.preadv

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append((offset, len(buffers[0])))
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    buffer = memoryview(bytearray(65536 * 3))
    reads = [Segment(file, offset, length, 0, length) for offset, length in ((5, 100_000), (250_000, 50_000))]
    assert replay(reads, Way(1, 65536, False), buffer)
    # Whole pages around them, in order, in pieces.
    assert read == [(0, 65536), (65536, 36864), (249856, 53248)]
    assert replay([], WAYS[0], buffer) is None
    rates = replay_all({"encoder": reads, "decoder": []})
    assert [way["threads"] for way in rates] == [way.threads for way in WAYS]
    assert all(way["decoder"] is None for way in rates)
    assert rates[-1]["encoder"] > 0
