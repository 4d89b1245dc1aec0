"""The pass over a whole text: plain transformers' loss, and each expert read once."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from switchrun import GenerationOptions, Session
from switchrun.bench.loss_pass import Batch, PassResult, hidden_bytes, make_batches, score_passages, split_passes
from switchrun.bench.spans import Passage, corrupt
from switchrun.checkpoint.types import ExpertKey
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.sessions import open_with_slots, oracle_for, small_process

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

SENTINELS = range(127, 107, -1)
MODELS = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "all sparse": {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2},
    "more decoder blocks": {"num_decoder_layers": 4, "num_sparse_decoder_layers": 2},
    "tokens over capacity": {"expert_capacity": 3},
    "router with bias": {"router_bias": True},
}


def made_up_passages(count: int = 13) -> list[Passage]:
    rng = random.Random(5)
    texts = [[rng.randrange(3, 100) for _ in range(rng.randrange(4, 60))] for _ in range(count)]
    return [corrupt(ids, SENTINELS, 1, rng) for ids in texts]


def saved(folder: Path, **settings: Any) -> Any:
    model = random_model(tiny_config(**settings))
    save_checkpoint(model, folder)
    save_tiny_tokenizer(folder)
    return model


def run(session: Session, passages: list[Passage], passes: int = 1, most_rows: int = 64) -> PassResult:
    batches = make_batches(passages, 3)
    share = -(-len(batches) // passes)
    passes_of = [batches[at : at + share] for at in range(0, len(batches), share)]
    return score_passages(session.engine.model, passes_of, most_rows)


@torch.no_grad()
def plain(oracle: Any, passage: Passage) -> tuple[float, list[int]]:
    """One passage at a time, without padding, through plain transformers."""
    output = oracle(input_ids=torch.tensor([passage.inputs]), labels=torch.tensor([passage.target]))
    return float(output.loss) * len(passage.target), output.logits[0].argmax(-1).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_that_of_plain_transformers(tmp_path: Path, name: str) -> None:
    oracle = oracle_for(saved(tmp_path, **MODELS[name]), "fp32")
    passages = made_up_passages()
    with open_with_slots(tmp_path, 2, dtype="fp32", batch_size=3) as session:
        result = run(session, passages)
    for passage, score in zip(passages, result.scores, strict=True):
        loss, predictions = plain(oracle, passage)
        assert score.loss == pytest.approx(loss, rel=1e-4)
        assert score.predictions == predictions


@pytest.mark.parametrize("slots", [1, 3, None])
def test_each_expert_is_read_once(tmp_path: Path, slots: int | None) -> None:
    saved(tmp_path, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2)
    reads: list[ExpertKey] = []
    with open_with_slots(tmp_path, slots, dtype="fp32", batch_size=3) as session:
        session.engine.cache.on_load = lambda key, _segments: reads.append(key)
        result = run(session, made_up_passages(40))
    assert len(reads) == len(set(reads)) == result.experts > 8


def test_the_number_of_passes_changes_nothing_but_the_reads(tmp_path: Path) -> None:
    saved(tmp_path)
    passages = made_up_passages()
    found = []
    for passes in (1, 2, 5):
        with open_with_slots(tmp_path, 1, dtype="fp32", batch_size=3) as session:
            result = run(session, passages, passes, most_rows=1 if passes == 2 else 64)
            found.append((result, session.engine.cache.counters().loads))
    one, loads = found[0]
    for result, more in found[1:]:
        assert [s.predictions for s in result.scores] == [s.predictions for s in one.scores]
        assert [s.loss for s in result.scores] == pytest.approx([s.loss for s in one.scores], rel=1e-5)
        assert more > loads
    assert [result.passes for result, _ in found] == [1, 2, 5]


def test_packed_experts(tmp_path: Path) -> None:
    """A pass in int8 or nf4 is near the one in fp32, and gives what one passage after another gives."""
    saved(tmp_path / "model")
    passages = made_up_passages()
    losses = {}
    for dtype in ("fp32", "int8", "nf4"):
        with Session.open(tmp_path / "model", dtype=dtype, batch_size=3, offload_folder=tmp_path / "off") as session:
            together = run(session, passages)
            alone = [run(session, [passage]).scores[0].loss for passage in passages]
            assert [score.loss for score in together.scores] == pytest.approx(alone, rel=1e-3)
            losses[dtype] = sum(alone)
    assert losses["int8"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["nf4"] == pytest.approx(losses["fp32"], rel=0.2)


def test_a_session_fills_as_before_after_a_pass(tmp_path: Path) -> None:
    saved(tmp_path)
    texts, options = ["the <extra_id_0> sat on the mat"], GenerationOptions(max_new_tokens=6)
    with open_with_slots(tmp_path, 2, dtype="fp32") as session:
        before = session.fill(texts, options)[0].output_ids
        run(session, made_up_passages(3))
        assert session.fill(texts, options)[0].output_ids == before


def test_passes_are_cut_where_the_memory_ends() -> None:
    batches = make_batches(made_up_passages(30), 3)
    whole = hidden_bytes(batches, 16, 4)
    assert split_passes(batches, 16, 4, whole) == [batches]
    assert split_passes(batches, 16, 4, 0) == [[batch] for batch in batches]
    third = split_passes(batches, 16, 4, whole // 3)
    assert 3 <= len(third) < len(batches)
    assert all(hidden_bytes(part, 16, 4) <= whole // 3 for part in third)


def test_the_hidden_states_take_what_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States, and the tokens that go to the experts, of a whole pass are within the stated bytes."""
    from switchrun.bench import loss_pass as module

    saved(tmp_path)
    most = 0
    original = module._feed_forward

    def watched(layer: Any, stack: Any, block: int, states: list[torch.Tensor], *more: Any) -> None:
        nonlocal most
        most = max(most, 2 * sum(state.nbytes for state in states))
        original(layer, stack, block, states, *more)

    monkeypatch.setattr(module, "_feed_forward", watched)
    with open_with_slots(tmp_path, 2, dtype="fp32", batch_size=3) as session:
        result = run(session, made_up_passages())
    assert 0 < most <= result.hidden_bytes


def test_batches_are_padded_on_the_right() -> None:
    batch: Batch = make_batches([Passage((5, 6, 7, 1), (127, 8, 126, 1)), Passage((5, 1), (127, 1))], 2)[0]
    assert batch.rows == (1, 0)
    assert batch.input_ids.tolist() == [[5, 1, 0, 0], [5, 6, 7, 1]]
    assert batch.labels.tolist() == [[127, 1, -100, -100], [127, 8, 126, 1]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
