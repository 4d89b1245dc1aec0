"""Rows that end early leave the decoder, and no other row notices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria

from switchrun import GenerationOptions, Session
from tests.support import oracle
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.sessions import open_with_slots, small_process

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

WORDS = "a man walks into the bar and orders cat dog mat red blue salt".split()
TEXTS = [f"{' '.join(WORDS[: 1 + number])} <extra_id_0> {' '.join(WORDS[number:])}" for number in range(12)]
OPTIONS = GenerationOptions(max_new_tokens=12)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_tokenizer(save_checkpoint(random_model(tiny_config(), seed=2), tmp_path / "m"))


def rows_of_steps(session: Session) -> list[int]:
    """Give a list to which each decoder step's rows will be added."""
    seen: list[int] = []
    session.engine.model.decoder.register_forward_pre_hook(
        lambda _, given, named: seen.append(len(named["input_ids"])), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
        {"min_new_tokens": 3, "forced_eos_token_id": 1},
        {"exponential_decay_length_penalty": [2, 1.5], "suppress_tokens": [5, 9], "remove_invalid_values": True},
        {"begin_suppress_tokens": [7, 8], "forced_bos_token_id": 6, "renormalize_logits": True},
    ],
    ids=lambda settings: next(iter(settings), "plain"),
)
def test_the_rows_that_go_on_are_as_alone(folder: Path, settings: dict[str, Any]) -> None:
    ends = list(range(2, 128, 5))
    own = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": ends} | settings
    (folder / "generation_config.json").write_text(json.dumps(own))
    expected = oracle.answers(folder, TEXTS, OPTIONS.max_new_tokens)
    with open_with_slots(folder, 2, batch_size=len(TEXTS)) as session:
        rows = rows_of_steps(session)
        results = session.fill(TEXTS, OPTIONS)
    assert [list(result.output_ids) for result in results] == expected
    assert len(set(map(len, expected))) > 1, "they do end at different times"
    assert rows == sorted(rows, reverse=True)
    assert rows[0] == 12 > rows[-1]


class _Stop(StoppingCriteria):
    """Stops all rows but two after the second token."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool)
        done[2:] = input_ids.shape[1] > 2
        done[:2] = input_ids.shape[1] > 7
        return done


def test_finished_rows_cost_nothing(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": 0}))
    with open_with_slots(folder, 2, batch_size=len(TEXTS)) as session:
        encoded = [session.encode(text) for text in TEXTS]
        rows = rows_of_steps(session)
        session._stop = _Stop()
        results = session.fill(encoded, OPTIONS)
        session._stop = None
        whole = session.fill(encoded, OPTIONS)
    assert rows[:7] == [12, 12, 2, 2, 2, 2, 2]
    order = [at for batch in session._batches(encoded, OPTIONS) for at in batch]
    for place, at in enumerate(order):
        length = 8 if place < 2 else 3
        assert results[at].output_ids == whole[at].output_ids[:length]
        assert results[at].finish_reason == "stop"
