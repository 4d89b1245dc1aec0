"""A server in a thread of this process, over a tiny model, and a client of a few lines."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from switchrun import Session
from switchrun.model.reporting import Reporter
from switchrun.serve.app import Guard, make_app
from switchrun.serve.scheduler import Scheduler
from switchrun.serve.server import Listener, make_server
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.sessions import small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]

LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Answer:
    """What a server answered; `record` is its JSON."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def record(self) -> Any:
        return json.loads(self.body)


@dataclass
class Served:
    """A server, its scheduler and session."""

    scheduler: Scheduler
    listener: Listener
    server: uvicorn.Server
    bugs: list[Exception] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.listener.socket.getsockname()[1])

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """Send a request on a connection of its own; a body that is no bytes is written as JSON."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, sent, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())

    def post(self, path: str, **body: Any) -> Answer:
        """Send a JSON body."""
        return self.ask("POST", path, body)

    def connect(self) -> socket.socket:
        """Open a bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(session: Session, *, max_queue: int = 64, token: str | None = None) -> Iterator[Served]:
    """Serve a session, and close it at the end."""
    bugs: list[Exception] = []

    def on_bug(error: Exception) -> str:
        bugs.append(error)
        return f"bug{len(bugs)}"

    def open_session(progress: Any) -> Session:
        session._report = Reporter(progress)
        return session

    opened = threading.Event()
    scheduler = Scheduler(open_session, max_queue, lambda _error: opened.set(), on_bug)
    app = make_app(scheduler, Guard(token, None if token else LOCAL), on_bug)
    with Listener("127.0.0.1", 0, None) as listener:
        listener.socket.listen()
        server = make_server(app, shutdown_grace=5)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener.socket])), daemon=True)
        scheduler.start()
        thread.start()
        wait_for(lambda: server.started and opened.is_set())
        try:
            yield Served(scheduler, listener, server, bugs)
        finally:
            scheduler.abort()
            server.should_exit = True
            thread.join(30)
            assert scheduler.join(30)
            assert not thread.is_alive()


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
