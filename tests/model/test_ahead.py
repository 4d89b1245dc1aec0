"""Keys and values of cross-attention computed during reads: all that there are, each once, and the same tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from switchrun import GenerationOptions, Session
from switchrun.experts.reader import FileReader
from switchrun.model.ahead import CrossAttentionAhead
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.sessions import generate, open_with_slots, oracle_for, small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

TEXTS = ("the <extra_id_0> sat on the <extra_id_1> .", "a man walks into a <extra_id_0>")
#: Four decoder blocks, of which the second and the fourth have experts.
SPEC = CheckpointSpec(decoder_step=2)
#: The first reads of the decoder are in its second block, whose own keys and values are needed before.
AHEAD = 2 * 2


class Work:
    """Counts what is computed, and holds reads up until nothing is left; interrupts once `fail_at` pieces were.

    Attributes:
        pieces: Keys and values that were computed during a read.
        products: How often each was computed in all.
    """

    def __init__(self, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pieces = 0
        self.fail_at: int | None = None
        cache, idle = session.engine.cache, threading.Event()
        step, read_piece = cache.meanwhile, FileReader._read_piece
        ahead: Any = step.__self__  # type: ignore[attr-defined]
        self.products = [0] * len(ahead._forwards)
        forwards = [partial(self._product, number, forward) for number, forward in enumerate(ahead._forwards)]
        monkeypatch.setattr(ahead, "_forwards", forwards)

        def counted() -> bool:
            if self.pieces == self.fail_at:
                idle.set()  # the cache waits for reads under way
                raise KeyboardInterrupt
            if step():
                self.pieces += 1
                return True
            idle.set()
            return False

        def late(reader: FileReader, *arguments: Any) -> None:
            assert idle.wait(10)
            read_piece(reader, *arguments)

        def begin(*_: Any) -> None:
            idle.clear()

        monkeypatch.setattr(cache, "meanwhile", counted)
        monkeypatch.setattr(FileReader, "_read_piece", late)
        for stack in (session.engine.model.encoder, session.engine.model.decoder):
            stack.register_forward_pre_hook(begin)

    def _product(self, number: int, forward: Callable[[Any], Any], states: Any) -> Any:
        self.products[number] += 1
        return forward(states)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder, model = tmp_path_factory.mktemp("checkpoint"), SPEC.model()
    SPEC.save(model, folder)
    save_tiny_tokenizer(folder)
    return folder, model


@pytest.fixture(params=["fp32", "bf16", "int8"])
def session(request: pytest.FixtureRequest, saved: tuple[Path, Any], tmp_path: Path) -> Iterator[Session]:
    opened = open_with_slots(saved[0], 1, dtype=request.param, batch_size=2, num_beams=2, offload_folder=tmp_path)
    with opened:
        yield opened


@pytest.mark.parametrize("beams", [1, 2])
def test_everything_is_computed_once_and_the_tokens_are_the_same(
    session: Session, monkeypatch: pytest.MonkeyPatch, beams: int
) -> None:
    options = GenerationOptions(max_new_tokens=6, num_beams=beams)
    with monkeypatch.context() as without:
        without.setattr(session.engine.cache, "meanwhile", lambda: False)
        expected = [result.output_ids for result in session.fill(TEXTS, options)]
    work = Work(session, monkeypatch)
    assert [result.output_ids for result in session.fill(TEXTS, options)] == expected
    generations = 1 if beams == 1 else len(TEXTS)  # beam search goes row by row
    assert work.pieces == AHEAD * generations
    assert work.products == [generations] * 8


def test_the_tokens_are_those_of_plain_transformers(saved: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = saved
    with open_with_slots(folder, 1, dtype="fp32", batch_size=2) as session:
        work = Work(session, monkeypatch)
        results = session.fill(TEXTS, GenerationOptions(max_new_tokens=6))
        assert work.pieces == AHEAD
        expected = generate(oracle_for(model, "fp32"), session, TEXTS, max_new_tokens=6)
    assert [list(result.output_ids) for result in results] == expected


def test_what_an_interrupted_fill_has_left_is_not_used(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    options = GenerationOptions(max_new_tokens=6)
    expected = session.fill(TEXTS[1:], options)[0].output_ids
    work = Work(session, monkeypatch)
    work.fail_at = 3
    with pytest.raises(KeyboardInterrupt):
        session.fill(TEXTS[:1], options)
    work.fail_at = None
    assert session.fill(TEXTS[1:], options)[0].output_ids == expected
    assert work.pieces == 3 + AHEAD


def test_a_decoder_on_disk_is_left_alone(saved: tuple[Path, Any]) -> None:
    with open_with_slots(saved[0], 1, dtype="fp32", device_map={"": "cpu", "decoder.block.3": "disk"}) as session:
        assert not isinstance(getattr(session.engine.cache.meanwhile, "__self__", None), CrossAttentionAhead)
