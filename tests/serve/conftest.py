"""A server in a thread of this process, over a tiny model, and a client of a few lines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from switchrun import Session
from tests.servers import Served, serving
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.sessions import small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    spec = CheckpointSpec()
    spec.save(spec.model(), folder)
    return save_tiny_tokenizer(folder)


def open_tiny(folder: Path, **options: Any) -> Session:
    return Session.open(folder, cpu_memory="1GiB", batch_size="auto", max_new_tokens=16, **options)


@pytest.fixture
def session(folder: Path, small_process: None) -> Session:
    return open_tiny(folder, num_beams=4)


@pytest.fixture
def served(session: Session) -> Iterator[Served]:
    with serving(session) as served:
        yield served


class Gate:
    """Holds the model thread back before each batch until it is opened, and notes the batches."""

    def __init__(self, session: Session) -> None:
        self._answer_batch = session.answer_batch
        self.batches: list[int] = []
        self.opened = threading.Event()
        session.answer_batch = self._wait  # type: ignore[method-assign]

    def _wait(self, inputs: Any, options: Any, ids: Any, controls: Any) -> Any:
        self.batches.append(len(inputs))
        assert self.opened.wait(60)
        return self._answer_batch(inputs, options, ids, controls)


@pytest.fixture
def gate(session: Session) -> Iterator[Gate]:
    gate = Gate(session)
    yield gate
    gate.opened.set()
