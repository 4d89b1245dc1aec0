"""Dense weights read ahead of the libraries."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from switchrun.experts.reader import FileReader, Segment
from switchrun.model.preload import DensePreload
from switchrun.model.session import open_session
from switchrun.planning.opening import plan_model
from switchrun.planning.options import OpenOptions
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config


def test_closing_waits_for_no_read_that_has_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when an opening fails, or Ctrl-C comes: gigabytes may still wait to be read."""
    model = save_tiny_tokenizer(save_checkpoint(random_model(tiny_config()), tmp_path / "model"))
    begun: list[Segment] = []
    proceed = threading.Event()

    def read_piece(_reader: FileReader, piece: Segment, _target: memoryview) -> None:
        begun.append(piece)
        assert proceed.wait(10)

    monkeypatch.setattr(FileReader, "_read_piece", read_piece)
    planned = plan_model(OpenOptions(model=model))
    preload = DensePreload(planned.checkpoint, planned.plan)
    threads = preload._reader._way.threads
    assert len(preload.landings) > threads + 1
    closing = threading.Thread(target=preload.close)
    closing.start()
    while preload._reader._pool._work_queue.qsize() > 1:  # what wakes the threads stays
        time.sleep(0.001)
    proceed.set()
    closing.join(10)
    assert not closing.is_alive()
    assert len(begun) <= threads


def test_an_interrupted_opening_closes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_tokenizer(save_checkpoint(random_model(tiny_config()), tmp_path / "model"))
    closed: list[DensePreload] = []

    def interrupt(_plan: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(DensePreload, "close", lambda preload: closed.append(preload))
    with pytest.raises(KeyboardInterrupt):
        open_session(OpenOptions(model=model), import_libraries=interrupt)
    assert len(closed) == 1
    monkeypatch.undo()
    closed[0].close()
