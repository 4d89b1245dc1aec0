"""Texts beyond the length that memory is reserved for: filled where there is room, else refused with what helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from switchrun import GenerationOptions, Session
from switchrun.checkpoint import open_checkpoint
from switchrun.errors import InputError
from switchrun.planning import memory
from switchrun.planning.opening import plan
from tests.support import oracle
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.edits import edit_config
from tests.support.sessions import open_with_slots, small_process

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

SHORT, LONG = "the <extra_id_0> sat", "a <extra_id_0> " + "cat dog mat " * 230
OPTIONS = GenerationOptions(max_new_tokens=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_tokenizer(save_checkpoint(random_model(tiny_config(), seed=2), tmp_path / "m"))


def test_where_there_is_room(folder: Path) -> None:
    texts = [SHORT, LONG, SHORT, SHORT]
    with Session.open(folder, cpu_memory="8GiB", batch_size=2) as session:
        results = session.fill(texts, OPTIONS)
    assert results[1].tokens.input > 690
    assert [result.id for result in results] == [0, 1, 2, 3]
    assert [list(result.output_ids) for result in results] == oracle.answers(folder, texts, 4)


def test_where_there_is_none(folder: Path) -> None:
    with open_with_slots(folder, None) as session:  # a budget without a byte to spare
        with pytest.raises(InputError, match=r"the text has 69\d tokens, there is memory for 512") as caught:
            session.encode(LONG)
        with pytest.raises(InputError, match="characters, there is memory for 512 tokens"):
            session.encode("a" * 100_000 + "<extra_id_0>")
    assert "a larger --batch-size" in caught.value.hint


def test_a_long_one_takes_the_place_of_several(folder: Path) -> None:
    texts = [SHORT, LONG, SHORT, SHORT, LONG, LONG, SHORT, LONG, LONG, LONG]
    with open_with_slots(folder, None, batch_size=6, max_new_tokens=4) as session:
        encoded = [session.encode(text) for text in texts]
        batches = session._batches(encoded, OPTIONS)
        results = session.fill(encoded, OPTIONS)
    assert max(len(batch) for batch in batches if texts[batch[0]] == LONG) < 6
    assert sorted(at for batch in batches for at in batch) == list(range(10))
    assert [result.input for result in results] == texts
    assert [list(result.output_ids) for result in results] == oracle.answers(folder, texts, 4)


@pytest.mark.parametrize(
    ("wish", "reserved"),
    [
        (64, 64),
        (1024, 1024),
        (10**30, 2048),
        (0, 512),
        (-5, 512),
        (True, 512),
        ("x", 512),
        (None, 512),
        (3.5, 512),
        ([], 512),
    ],
)
def test_what_config_json_may_wish(folder: Path, wish: object, reserved: int) -> None:
    edit_config(folder, n_positions=wish)
    assert memory.max_input_tokens(open_checkpoint(str(folder))) == reserved
    assert plan(folder, cpu_memory="4GiB", gpu_memory=0).minimum_cpu_bytes < 1 << 30


def test_the_longest_input_is_exact(folder: Path) -> None:
    made = plan(folder, cpu_memory="2GiB", gpu_memory=0)
    checkpoint = open_checkpoint(str(folder))
    longest = memory.longest_input(checkpoint, made)
    assert longest > 512
    assert memory.has_room(checkpoint, made, memory.BatchShape(1, longest, 512))
    assert not memory.has_room(checkpoint, made, memory.BatchShape(1, longest + 1, 512))
