"""Scores of fillings, held against plain transformers' own forward, one filling at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from switchrun import Filling, ScoreResult, Session
from switchrun.errors import InputError, ModelError, UsageError
from switchrun.planning import memory
from tests.conftest import validate
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.sessions import open_with_slots, oracle_for, small_process
from tests.support.strategies import CheckpointSpec, checkpoint_specs

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

FILLINGS = (
    Filling("the <extra_id_0> sat on the <extra_id_1> .", ["cat", "red mat"]),
    Filling("a man walks into a <extra_id_0>", ["bar and orders a beer with a pinch of salt"]),
    Filling("<extra_id_0> and salt , <extra_id_1> with the dog <extra_id_2> beer <extra_id_3>", ["a", "", "blue", "W"]),
)
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def log_probabilities(oracle: Any, session: Session, text: str, target: str) -> tuple[list[int], list[float]]:
    """Each target token's, as `model(input_ids, labels=…)` computes it."""
    tokenizer = session._tokenizer._tokenizer
    labels = tokenizer(target, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = oracle(tokenizer(text, return_tensors="pt").input_ids, labels=labels).logits
    found = logits.float().log_softmax(-1).gather(-1, labels[..., None])[0, :, 0]
    return labels[0].tolist(), found.tolist()


def target_of(filling: Filling) -> str:
    parts = [f"<extra_id_{at}> {span}" if span else f"<extra_id_{at}>" for at, span in enumerate(filling.spans)]
    return "".join(parts) + f"<extra_id_{len(parts)}>"


def by_span(ids: Sequence[int], values: Sequence[float], count: int, first: int = 127) -> list[float]:
    """The sums between sentinels, whose ids go down from the first one's; the text ends with one."""
    places = [ids.index(first - at) for at in range(count + 1)]
    return [sum(values[left + 1 : right]) for left, right in pairwise(places)]


def saved(spec: CheckpointSpec, folder: Path) -> Any:
    model = spec.model()
    spec.save(model, folder)
    save_tiny_tokenizer(folder)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(CheckpointSpec(), tmp_path / "m")
    return tmp_path / "m"


@settings(SETTINGS, max_examples=10)
@given(
    spec=checkpoint_specs(), dtype=st.sampled_from(["fp32", "bf16"]), batch=st.integers(1, 3), slots=st.integers(1, 4)
)
def test_scores_are_those_of_transformers(
    tmp_path_factory: pytest.TempPathFactory, spec: CheckpointSpec, dtype: str, batch: int, slots: int
) -> None:
    """Any capacity, too: padding takes nobody's place."""
    folder = tmp_path_factory.mktemp("m")
    model = saved(spec, folder)
    oracle = oracle_for(model, dtype)
    tolerance, least = (1e-4, 1e-4) if dtype == "fp32" else (0.05, 0.5)
    with open_with_slots(folder, slots, dtype=dtype, batch_size=batch) as session:
        results = session.score(FILLINGS)
        for filling, result in zip(FILLINGS, results, strict=True):
            ids, values = log_probabilities(oracle, session, filling.text, target_of(filling))
            assert list(result.target_ids) == ids
            assert result.log_probability == pytest.approx(sum(values), tolerance, least)
            expected = by_span(ids, values, len(filling.spans))
            assert [span.log_probability for span in result.spans] == pytest.approx(expected, tolerance, least)
            assert [span.text for span in result.spans] == list(filling.spans)


def test_a_batch_reads_each_expert_once_and_padding_none(tmp_path: Path) -> None:
    oracle = saved(CheckpointSpec(experts=64, encoder_step=1, decoder_step=1), tmp_path)
    used: list[set[int]] = []
    routers = [block.layer[-1].mlp.router for stack in (oracle.encoder, oracle.decoder) for block in stack.block]
    with open_with_slots(tmp_path, None, batch_size=3) as session:
        for number, router in enumerate(routers):
            used.append(set())
            router.register_forward_hook(
                lambda _module, _inputs, output, at=number: used[at].update(output[0].nonzero()[:, -1].tolist())
            )
        for filling in FILLINGS:
            log_probabilities(oracle, session, filling.text, target_of(filling))
        (one, *_) = session.score(FILLINGS)
    assert one.experts.requests == one.experts.loads == sum(map(len, used))


def test_dropped_tokens_of_both_stacks_are_counted(tmp_path: Path) -> None:
    oracle = saved(CheckpointSpec(capacity=1, encoder_step=1, decoder_step=1), tmp_path)
    dropped: list[int] = []
    for stack in (oracle.encoder, oracle.decoder):
        for block in stack.block:
            block.layer[-1].mlp.router.register_forward_hook(
                lambda _module, _inputs, output: dropped.append(int((output[0].sum(-1) == 0).sum()))
            )
    with open_with_slots(tmp_path, None, batch_size=3) as session:
        for filling, result in zip(FILLINGS, session.score(FILLINGS), strict=True):
            dropped.clear()
            log_probabilities(oracle, session, filling.text, target_of(filling))
            assert result.tokens.dropped == sum(dropped) > 0


def test_records_follow_the_schema(folder: Path) -> None:
    with open_with_slots(folder, 2, batch_size=2) as session:
        results = session.score(FILLINGS, ids=[4, 5, 6])
        stats = session.stats()
    for result in results:
        record = result.as_record()
        validate(record | {key: list(record[key]) for key in ("target_ids", "spans")}, "score")
    assert [result.id for result in results] == [4, 5, 6]
    assert results[0].text == "the cat sat on the red mat ."
    assert results[2].spans[1].log_probability == 0
    assert (stats.inputs, stats.ttft_seconds) == (3, None)


@pytest.mark.parametrize("batch_size", [2, "auto"])
def test_batches_of_like_length(folder: Path, batch_size: int | str) -> None:
    batches: list[list[ScoreResult]] = []
    with open_with_slots(folder, None, batch_size=batch_size) as session:
        alone = [session.score([filling])[0].log_probability for filling in FILLINGS]
        results = session.score(FILLINGS, ids=[7, 3, 5], on_results=lambda batch: batches.append(list(batch)))
        with pytest.raises(UsageError, match=r"^ids: 1 for 3"):
            session.score(FILLINGS, ids=[0])
    assert [result.id for result in results] == [7, 3, 5]
    assert [result.log_probability for result in results] == pytest.approx(alone, rel=1e-5)
    assert [[result.id for result in batch] for batch in batches] == ([[5, 3], [7]] if batch_size == 2 else [[5, 3, 7]])


def test_the_last_sentinel_of_a_vocabulary(folder: Path) -> None:
    """There is none to end the answer with."""
    text = " ".join(f"<extra_id_{number}>" for number in range(20))
    with open_with_slots(folder, None) as session:
        (result,) = session.score([Filling(text, ["a"] * 20)])
    assert result.target_ids[-1] == 1
    assert result.spans[19].log_probability < 0


@pytest.mark.parametrize(
    ("text", "spans", "message"),
    [
        ("no blank", [], "the text has no sentinel"),
        ("a <extra_id_0>", [], "the text has 1 sentinel, but 0 spans came with it"),
        ("a <extra_id_0> <extra_id_1>", ["x"], "the text has 2 sentinels, but 1 span came with it"),
        ("a <extra_id_0>", ["b <extra_id_0>"], "a span has a sentinel in it"),
    ],
)
def test_what_is_no_filling(text: str, spans: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Filling(text, spans)
    assert caught.value.message.startswith(message)
    assert caught.value.hint


def test_too_long_a_filling(folder: Path) -> None:
    with open_with_slots(folder, None) as session:
        with pytest.raises(InputError, match=r"^there is no memory to score 6\d\d\d tokens of spans in a text of \d+"):
            session.score([Filling("a <extra_id_0>", ["b " * 3000])])
        with pytest.raises(InputError, match=r"^the spans have \d+ characters"):
            session.encode_filling(Filling("a <extra_id_0>", ["b " * 500_000]))
        with pytest.raises(InputError, match=r"^the text has \d+ tokens, there is memory for 512"):
            session.encode_filling(Filling("a " * 600 + "<extra_id_0>", ["b"]))


def test_what_cannot_be_scored(folder: Path) -> None:
    with open_with_slots(folder, None) as session:
        assert session.score(FILLINGS[0]).id == 0
        for wrong in ("text", ["text"], [("a <extra_id_0>", ["b"])]):
            with pytest.raises(UsageError, match=r"^fillings: .* is no Filling$"):
                session.score(wrong)  # type: ignore[arg-type]
        assert session.score([]) == []
        session.engine.model.lm_head.weight.data.fill_(float("nan"))
        with pytest.raises(ModelError, match="no finite numbers"):
            session.score(FILLINGS)


def test_scoring_takes_more_than_the_encoder_and_is_planned(folder: Path) -> None:
    with open_with_slots(folder, None) as session:
        checkpoint, precision = session.checkpoint, session.plan.precision

    def needed(target: int, beams: int = 1) -> int:
        return memory.activation_bytes(checkpoint, precision, memory.BatchShape(1, 512, 64, beams, target=target))

    assert needed(0) < needed(512) < needed(1024)
    # A vocabulary of a few tokens and a few layers: what beams keep is less than what scoring them takes.
    assert needed(512, beams=8) > 3 * needed(512)
