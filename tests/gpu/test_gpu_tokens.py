"""The sacred test with GPUs: the tokens of plain transformers on the CPU, wherever the weights and slots are."""

from __future__ import annotations

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from switchrun import Filling, GenerationOptions, ScoreResult, Session
from tests.model.test_same_tokens import MAX_NEW_TOKENS, TEXTS, check_ids, check_logits, saved
from tests.support.fake_accelerator import fake_gpus
from tests.support.gpu_sessions import open_on_gpus
from tests.support.sessions import generate, open_with_slots, oracle_for, read_in_small_pieces, small_process
from tests.support.strategies import CheckpointSpec, checkpoint_specs

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

MAPS: list[dict[str, Any]] = [
    {"": 0},
    {"": 0, "encoder": "cpu"},
    {"": 0, "encoder": "disk", "decoder.block.0": "disk"},
    {"": 0, "shared": "disk"},
    {"": "cpu", "decoder": 0},
    {"": "disk", "decoder": 0, "decoder.embed_tokens": "disk"},
    {"": "cpu", "encoder.block.0": 0, "encoder.block.1": "disk", "decoder.block.1": 0},
    {"": 0, "decoder": 1},
    {"": 1, "encoder": 0, "lm_head": "cpu"},
    {"": 0, "encoder.block.1": 1, "decoder.block.0": "disk", "decoder.block.1": 1},
    {"": "cpu", "encoder": 0, "encoder.block.1.layer.1": 1, "decoder.block.1.layer.2": 0},
]
#: Slots on each GPU and in CPU memory; None is one for each expert.
SLOTS: list[tuple[int, int | None]] = [(8, None), (1, 1), (2, 1), (1, 3), (2, None)]
MIXES = [
    *((device_map, SLOTS[at % len(SLOTS)], "fp32") for at, device_map in enumerate(MAPS)),
    *((device_map, SLOTS[at % len(SLOTS)], "bf16") for at, device_map in enumerate(MAPS[:8:2], 1)),
]


@pytest.mark.parametrize(
    ("device_map", "slots", "dtype"),
    # Each takes two seconds: CI runs all.
    [pytest.param(*mix, marks=pytest.mark.slow if at % 2 else ()) for at, mix in enumerate(MIXES)],
    ids=str,
)
def test_every_mix_of_tiers(
    tmp_path: Path, device_map: dict[str, Any], slots: tuple[int, int | None], dtype: str
) -> None:
    oracle = oracle_for(saved(CheckpointSpec(container="torch", tied=dtype == "bf16"), tmp_path), dtype)
    with fake_gpus(None, None) as gpus:
        with open_on_gpus(tmp_path, device_map, *slots, dtype=dtype, batch_size=3) as session:
            check_logits(oracle, session, dtype)
            check_ids(oracle, session, TEXTS, dtype)
            check_ids(oracle, session, TEXTS[:1], dtype)
            used = {tier for tier in device_map.values() if isinstance(tier, int)}
            assert {gpu.index for gpu in gpus if gpu.bytes_to_device} == used
            assert session.engine.tiers.gpus.keys() == used
        assert [(gpu.allocated, gpu.allocator.reserved) for gpu in gpus] == [(0, 0), (0, 0)]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    spec=checkpoint_specs(),
    dtype=st.sampled_from(["fp32", "bf16"]),
    slots=st.sampled_from(SLOTS),
    small_reads=st.booleans(),
    tiers=st.fixed_dictionaries(
        {module: st.sampled_from([0, 1, "cpu", "disk"]) for module in ("", "encoder", "decoder", "shared")}
    ),
)
def test_every_kind_of_model(
    spec: CheckpointSpec, dtype: str, slots: tuple[int, int | None], small_reads: bool, tiers: dict[str, Any]
) -> None:
    with TemporaryDirectory() as folder, fake_gpus(None, None), pytest.MonkeyPatch.context() as patched:
        if small_reads:
            read_in_small_pieces(patched)
        oracle = oracle_for(saved(spec, Path(folder)), dtype)
        with open_on_gpus(Path(folder), tiers, *slots, dtype=dtype, batch_size=3) as session:
            check_logits(oracle, session, dtype)
            check_ids(oracle, session, TEXTS, dtype)


@pytest.mark.parametrize("device_map", [MAPS[0], MAPS[7], MAPS[8]], ids=str)
def test_scores_alternatives_and_explanations(tmp_path: Path, device_map: dict[str, Any]) -> None:
    """As on the CPU, which other tests compare with transformers."""
    saved(CheckpointSpec(), tmp_path)
    fillings = [Filling(TEXTS[0], ["cat", "mat"]), Filling(TEXTS[1], ["bar and a beer"])]
    options = [
        GenerationOptions(max_new_tokens=8, explain=True),
        GenerationOptions(max_new_tokens=8, alternatives=2, explain=True),
        GenerationOptions(max_new_tokens=8, alternatives=2, sample=True, temperature=1e-6),
    ]

    def results(session: Session) -> list[Any]:
        filled = [session.fill(TEXTS, each) for each in options]
        return [*session.score(fillings), *itertools.chain(*filled)]

    with open_with_slots(tmp_path, None, batch_size=3, num_beams=4, max_new_tokens=8) as session:
        expected = results(session)
    with (
        fake_gpus(None, None),
        open_on_gpus(tmp_path, device_map, 2, 2, batch_size=3, num_beams=4, max_new_tokens=8) as session,
    ):
        found = results(session)
    for one, other in zip(found, expected, strict=True):
        assert one.text == other.text
        if isinstance(one, ScoreResult):
            assert one.log_probability == pytest.approx(other.log_probability, rel=1e-5)
            continue
        scores = [[each.log_probability for each in result.alternatives or ()] for result in (one, other)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)
        chosen = [
            [layer.experts for layer in result.routing.layers] if result.routing else [] for result in (one, other)
        ]
        assert chosen[0] == chosen[1]


@pytest.mark.parametrize("device_map", [MAPS[0], MAPS[7]], ids=str)
def test_beams(tmp_path: Path, device_map: dict[str, Any]) -> None:
    oracle = oracle_for(saved(CheckpointSpec(), tmp_path), "fp32")
    options = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS, num_beams=3)
    with fake_gpus(None, None), open_on_gpus(tmp_path, device_map, 2, 2, batch_size=3, num_beams=3) as session:
        expected = generate(oracle, session, TEXTS, num_beams=3, max_new_tokens=MAX_NEW_TOKENS)
        assert [list(result.output_ids) for result in session.fill(TEXTS, options)] == expected
