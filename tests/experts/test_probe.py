"""The way of reading a disk is tried once for each device, and only a clear winner replaces the usual one."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from switchrun.checkpoint.types import ExpertKey, ExpertSlices, TensorSlice
from switchrun.experts import probe
from switchrun.experts.probe import best_way, reading_way
from switchrun.experts.reader import WAYS
from switchrun.machine import disks

USUAL, OTHER, *REST = WAYS


@pytest.fixture
def experts(tmp_path: Path) -> dict[ExpertKey, ExpertSlices]:
    file = tmp_path / "experts"
    file.write_bytes(bytes(range(256)) * 16 * 256)  # 1 MiB
    half = [TensorSlice(file, offset, 2**19, "F32", (2**17, 1)) for offset in (0, 2**19)]
    return {ExpertKey("encoder", 1, number): ExpertSlices(*half) for number in range(300)}


def rates() -> dict[probe.Way, list[float]]:
    return {way: [1.0, 1.0, 1.0] for way in WAYS}


def test_a_clear_winner_is_chosen() -> None:
    assert best_way(rates() | {OTHER: [0.5, 1.5, 1.6]}) == OTHER


def test_noise_changes_nothing() -> None:
    assert best_way(rates() | {OTHER: [9.0, 1.1, 1.1]}) == USUAL
    assert best_way(rates() | {USUAL: [1.0, 1.0], OTHER: [9.0]}) == USUAL


def test_the_answer_is_kept_for_the_device(
    experts: dict[ExpertKey, ExpertSlices], monkeypatch: pytest.MonkeyPatch, hermetic: dict[str, str]
) -> None:
    tried = []

    def fake(given: object) -> dict[probe.Way, list[float]]:
        tried.append(given)
        return rates() | {OTHER: [2.0, 2.0]}

    monkeypatch.setattr(probe, "_probe", fake)
    file = experts[ExpertKey("encoder", 1, 0)].wi.file
    assert [reading_way(experts), reading_way(experts)] == [OTHER, OTHER]
    assert len(tried) == 1
    kept = json.loads((Path(hermetic["SWITCHRUN_CACHE"]) / "reading.json").read_text())
    assert kept == {disks.filesystem_id(file): asdict(OTHER)}


@pytest.mark.parametrize("content", ["", "[]", '{"DEVICE": {"threads": -1}}', '{"DEVICE": 5}'])
def test_a_damaged_answer_is_tried_again(
    experts: dict[ExpertKey, ExpertSlices], monkeypatch: pytest.MonkeyPatch, hermetic: dict[str, str], content: str
) -> None:
    file = Path(hermetic["SWITCHRUN_CACHE"]) / "reading.json"
    file.parent.mkdir(parents=True)
    file.write_text(content.replace("DEVICE", disks.filesystem_id(experts[ExpertKey("encoder", 1, 0)].wi.file)))
    monkeypatch.setattr(probe, "_probe", lambda _: rates() | {OTHER: [2.0, 2.0]})
    assert reading_way(experts) == OTHER


def test_every_way_is_tried_on_the_experts_themselves(
    experts: dict[ExpertKey, ExpertSlices], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "PROBE_SECONDS", 60.0)
    samples = probe._probe(experts)
    assert sum(map(len, samples.values())) == 2 * probe._MOST_EXPERTS
    assert all(rate > 0 for each in samples.values() for rate in each)
    assert max(map(len, samples.values())) - min(map(len, samples.values())) <= 1


def test_a_file_that_cannot_be_read_is_left_to_whoever_needs_it(
    experts: dict[ExpertKey, ExpertSlices], tmp_path: Path
) -> None:
    with open(tmp_path / "experts", "r+b") as file:
        file.truncate(2**18)
    assert reading_way(experts) == USUAL


def test_holes_are_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "holes", "wb") as file:
        file.truncate(2**20)
    hole = TensorSlice(tmp_path / "holes", 0, 2**19, "F32", (2**17, 1))
    monkeypatch.setattr(probe, "_probe", lambda _: pytest.fail("holes were read"))
    assert reading_way({ExpertKey("encoder", 1, 0): ExpertSlices(hole, hole)}) == USUAL
