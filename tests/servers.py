"""Servers in a thread of this process: a warm session behind the routes, and one that answers as it is told."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from switchrun import Session
from switchrun.model.reporting import Reporter
from switchrun.serve.app import Guard, make_app
from switchrun.serve.scheduler import Scheduler
from switchrun.serve.server import Listener, make_server

#: Called with a connection, the request's first line and headers, and its body.
Answer = Callable[[socket.socket, str, bytes], object]


LOCAL = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True)
class Answered:
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
    def url(self) -> str:
        return self.listener.url

    @property
    def port(self) -> int:
        return int(self.listener.socket.getsockname()[1])

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answered:
        """Send a request on a connection of its own; a body that is no bytes is written as JSON."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, sent, {name.replace("_", "-"): text for name, text in headers.items()})
            response = connection.getresponse()
            return Answered(response.status, dict(response.getheaders()), response.read())

    def post(self, path: str, **body: Any) -> Answered:
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


@contextmanager
def serving(
    session: Session, *, max_queue: int = 64, token: str | None = None, path: Path | None = None
) -> Iterator[Served]:
    """Serve a session, and close it at the end; at a path, on a Unix socket."""
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
    with Listener("127.0.0.1", 0, path) as listener:
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


@contextmanager
def stub(answer: Answer) -> Iterator[str]:
    """Answer each connection in the way that is given, one after the other; yields the URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    answer(connection, *_request(connection))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _request(connection: socket.socket) -> tuple[str, bytes]:
    received = b""
    # Who begins with 0x16 wants TLS.
    while b"\r\n\r\n" not in received and received[:1] != b"\x16" and (piece := connection.recv(65536)):
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < int(lengths[0] if lengths else 0) and (piece := connection.recv(65536)):
        body += piece
    return head.decode("latin-1"), body


def response(document: Any, status: int = 200, **headers: str) -> bytes:
    """Write a response with JSON, or with bytes as they are."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def refusal(status: int, kind: str, **headers: str) -> bytes:
    """Write a response with an error of the server's."""
    return response({"error": {"kind": kind, "message": "it is so", "hint": "do this"}}, status, **headers)


def without_costs(record: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a record what depends on when and beside what it was answered."""
    return {name: value for name, value in record.items() if name not in ("timing", "experts", "memory")}
