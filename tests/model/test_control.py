"""Rows of a batch that have limits of their own, are stopped by others, and say which tokens they have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from switchrun import GenerationOptions, Session
from switchrun.model.control import RowControl
from switchrun.model.reporting import Reporter
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.sessions import open_with_slots, small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

TEXTS = (
    "the <extra_id_0> sat on the <extra_id_1> .",
    "a <extra_id_0> walks into a bar",
    "the cat <extra_id_0>",
    "salt and <extra_id_0>",
)
LIMITS = (3, 9, 1, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("control")
    spec = CheckpointSpec()
    spec.save(spec.model(), folder)
    return save_tiny_tokenizer(folder)


@pytest.fixture
def session(folder: Path, small_process: None) -> Iterator[Session]:
    with open_with_slots(folder, 4, dtype="fp32", batch_size=4, num_beams=2) as session:
        yield session


def run(session: Session, options: GenerationOptions, controls: Sequence[RowControl]) -> list[Any]:
    encoded = [session.encode(text) for text in TEXTS]
    assert session.together(encoded, options) == [0, 1, 2, 3]
    return list(session.answer_batch(encoded, options, range(4), controls))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 2}, {"sample": True, "temperature": 3.0, "seed": 4}, {"explain": True}],
    ids=["greedy", "beams", "drawn", "explained"],
)
def test_each_row_ends_at_its_own_limit(session: Session, options: dict[str, Any]) -> None:
    whole = GenerationOptions(max_new_tokens=max(LIMITS), **options)
    results = run(session, whole, [RowControl(limit) for limit in LIMITS])
    for number, (text, limit, result) in enumerate(zip(TEXTS, LIMITS, results, strict=True)):
        alone = session.fill(text, replace(whole, max_new_tokens=limit), ids=[number])
        assert (result.output_ids, result.finish_reason, result.spans) == (
            alone.output_ids,
            alone.finish_reason,
            alone.spans,
        )
        assert len(result.output_ids) - 1 <= limit


def test_a_last_token_that_depends_on_the_limit(session: Session) -> None:
    session.engine.model.generation_config.forced_eos_token_id = 1
    options = GenerationOptions(max_new_tokens=max(LIMITS))
    results = run(session, options, [RowControl(limit) for limit in LIMITS])
    for text, limit, result in zip(TEXTS, LIMITS, results, strict=True):
        assert result.output_ids == session.fill(text, replace(options, max_new_tokens=limit)).output_ids
        assert result.output_ids[-1] == 1


def test_tokens_are_heard_as_they_come(session: Session) -> None:
    heard: list[tuple[int, ...]] = []
    controls = [RowControl(9, None if at else lambda ids: heard.append(tuple(ids))) for at in range(4)]
    result = run(session, GenerationOptions(max_new_tokens=9), controls)[0]
    assert heard == [result.output_ids[: length + 2] for length in range(len(result.output_ids) - 1)]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"sample": True}], ids=["greedy", "beams", "drawn"])
def test_a_row_that_is_stopped_leaves_the_others_alone(session: Session, options: dict[str, Any]) -> None:
    whole = GenerationOptions(max_new_tokens=9, **options)
    alone = run(session, whole, [RowControl() for _ in TEXTS])
    controls = [RowControl() for _ in TEXTS]
    controls[1].stop()
    results = run(session, whole, controls)
    for number in (0, 2, 3):
        assert results[number].output_ids == alone[number].output_ids
    assert len(results[1].output_ids) <= 2


def test_rows_that_are_stopped_load_nothing_more(session: Session) -> None:
    options = GenerationOptions(max_new_tokens=9)
    controls = [RowControl() for _ in TEXTS]

    def stop_at_the_first_layer(_progress: Any) -> None:
        for control in controls:
            control.stop()

    before = session.engine.tiers.counters()["cpu"].requests
    session._report = Reporter(stop_at_the_first_layer)
    results = run(session, options, controls)
    session._report = Reporter()
    asked = session.engine.tiers.counters()["cpu"].requests - before
    layers = len(session.checkpoint.sparse_blocks["encoder"])
    assert layers > 1
    assert asked <= sum(len(session.encode(text).ids) for text in TEXTS) + 4, "one layer of the encoder, one token"
    assert all(len(result.output_ids) <= 2 for result in results)
