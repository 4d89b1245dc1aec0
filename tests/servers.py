"""Servers for tests of the client: a warm session behind the real routes, and one that answers what it is told to."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from switchrun import Session
from switchrun.serve.app import Guard, make_app
from switchrun.serve.scheduler import Scheduler
from switchrun.serve.server import Listener, make_server

#: Called with a connection, the request's first line and headers, and its body.
Answer = Callable[[socket.socket, str, bytes], object]


@contextmanager
def serving(session: Session, token: str | None = None, path: Path | None = None) -> Iterator[str]:
    """Serve a session, which is closed at the end; yields the URL."""
    scheduler = Scheduler(lambda _progress: session, 64, lambda _error: None, lambda _bug: "0")
    scheduler.start()
    server = make_server(make_app(scheduler, Guard(token, None), lambda _bug: "0"), shutdown_grace=5)
    with Listener("127.0.0.1", 0, path) as listener:
        listener.socket.listen()
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener.socket])))
        thread.start()
        while not (scheduler.ready and server.started):
            time.sleep(0.01)
        try:
            yield listener.url
        finally:
            server.should_exit = True
            thread.join()
            scheduler.abort()
            scheduler.join()


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
