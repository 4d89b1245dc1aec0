"""How texts are divided into batches, and that it changes no answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchrun import GenerationOptions, Session
from switchrun.errors import UsageError
from switchrun.model.batching import batches_of
from tests.support import oracle
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.sessions import small_process

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

WORDS = "a man walks into the bar and orders cat dog mat red blue salt".split()
#: From 5 to 600 tokens, as they may come.
TEXTS = [
    " ".join(["<extra_id_0>", *(WORDS[(at + number) % len(WORDS)] for at in range(length))])
    for number, length in enumerate((3, 40, 4, 590, 8, 9, 300, 3, 25, 600, 5, 70, 6, 12, 18, 7))
]
SHORT = GenerationOptions(max_new_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batching") / "m"
    return save_tiny_tokenizer(save_checkpoint(random_model(tiny_config(), seed=2), folder))


@given(
    lengths=st.lists(st.integers(1, 700), max_size=60),
    room=st.integers(1, 10_000),
    most=st.integers(1, 40),
)
def test_every_input_is_in_one_batch_that_fits(lengths: list[int], room: int, most: int) -> None:
    batches = batches_of(lengths, lambda rows, tokens: rows <= most and rows * tokens <= room)
    assert sorted(at for batch in batches for at in batch) == list(range(len(lengths)))
    for batch in batches:
        rows, longest, real = len(batch), max(lengths[at] for at in batch), sum(lengths[at] for at in batch)
        assert rows == 1 or (rows <= most and rows * longest <= room)
        assert rows * longest <= 2 * real + 512, "a long input must not make a hundred short ones as long"
    ordered = [lengths[at] for batch in batches for at in batch]
    assert ordered == sorted(lengths, reverse=True)


def test_what_a_batch_is() -> None:
    assert batches_of([], lambda _rows, _tokens: True) == []
    assert batches_of([30] * 200, lambda rows, _: rows <= 64) == [
        list(range(start, min(start + 64, 200))) for start in range(0, 200, 64)
    ]
    assert batches_of([20, 600, 30], lambda _rows, _tokens: True) == [[1, 2, 0]]
    assert batches_of([600, *[30] * 9], lambda _rows, _tokens: True) == [[0, 1, 2], [3, 4, 5, 6, 7, 8, 9]]
    assert batches_of([600, 600], lambda _rows, _tokens: False) == [[0], [1]], "one is filled whatever is said"


def test_auto_answers_as_one_by_one(folder: Path) -> None:
    with Session.open(folder, cpu_memory="1GiB", batch_size="auto") as session:
        encoded = [session.encode(text) for text in TEXTS]
        batches = session._batches(encoded, SHORT)
        results = session.fill(TEXTS, SHORT, ids=range(3, 3 + len(TEXTS)))
    assert 1 < len(batches) < len(TEXTS) / 2
    assert [result.input for result in results] == TEXTS
    assert [result.id for result in results] == list(range(3, 3 + len(TEXTS)))
    assert [list(result.output_ids) for result in results] == oracle.answers(folder, TEXTS, 5)


def test_an_id_for_each_text(folder: Path) -> None:
    with Session.open(folder, cpu_memory="1GiB") as session, pytest.raises(UsageError, match="ids: 1 for 2 inputs"):
        session.fill(TEXTS[:2], SHORT, ids=[4])


@pytest.mark.parametrize("beams", [1, 2])
def test_the_same_seed_draws_the_same_whatever_the_batch(folder: Path, beams: int) -> None:
    """And an input keeps its draw if the one before it cannot be filled."""
    options = GenerationOptions(max_new_tokens=5, sample=True, temperature=3.0, seed=7, num_beams=beams)
    texts = [TEXTS[0]] * 4 + TEXTS[4:6]
    with Session.open(folder, cpu_memory="1GiB", batch_size="auto", num_beams=2) as session:
        together = [result.output_ids for result in session.fill(texts, options)]
        alone = [session.fill(text, options, ids=[number]).output_ids for number, text in enumerate(texts)]
        some = session.fill(texts[1::2], options, ids=[1, 3, 5])
    assert together == alone
    assert [(result.id, result.output_ids) for result in some] == [(at, alone[at]) for at in (1, 3, 5)]
    assert len(set(alone[:4])) > 1, "the same text on two lines is not answered twice the same"
