"""The process around the app: its sockets, its signals, and clients that are slow or many."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from switchrun.errors import StorageError, UsageError
from switchrun.serve.scheduler import Scheduler

#: So many clients may be connected.
_MOST_CONNECTIONS = 512
#: The head of a request may take so many bytes, and so many seconds to come.
_MOST_HEAD_BYTES = 64 * 1024
_HEAD_SECONDS = 10.0
#: How long the model thread may take to end, once nothing is left for it.
_JOIN_SECONDS = 5.0


class Listener:
    """A socket that is listened on; `url` is how clients call it. Leaving the context closes it, and removes its file.

    Raises:
        UsageError: The address is in use, or none of this machine's.
        StorageError: The socket's file cannot be made.
    """

    def __init__(self, host: str, port: int, path: Path | None) -> None:
        self._path = path
        self.socket = _unix_socket(path) if path is not None else _tcp_socket(host, port)
        if path is not None:
            self.url = f"unix:{path}"
        else:
            shown = f"[{host}]" if ":" in host else host
            self.url = f"http://{shown}:{self.socket.getsockname()[1]}"

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _tcp_socket(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with _closed_on_error(socket.socket(family, socket.SOCK_STREAM)) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
    except OSError as error:
        words = error.strerror or error
        raise UsageError(f"{host}:{port} cannot be listened on: {words}", "try another --port") from error
    return found


def _unix_socket(path: Path) -> socket.socket:
    """Make a socket that only its owner may use, in the place of one that nobody listens on any more."""
    try:
        with _closed_on_error(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as found:
            if path.is_socket():
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                    if other.connect_ex(str(path)) == 0:
                        raise UsageError(f"--socket: another server listens on {path}", "choose another path")
                path.unlink()
            before = os.umask(0o177)
            try:
                found.bind(str(path))
            finally:
                os.umask(before)
    except OSError as error:
        raise StorageError(f"--socket {path}: {error.strerror or error}") from error
    return found


@contextlib.contextmanager
def _closed_on_error(found: socket.socket) -> Iterator[socket.socket]:
    try:
        yield found
    except BaseException:
        found.close()
        raise


class _Protocol(H11Protocol):
    """Closes connections on which the head of a request does not come."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self._waiting = self.loop.call_later(_HEAD_SECONDS, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete):
            self._waiting = self._waiting or self.loop.call_later(_HEAD_SECONDS, self.transport.close)
        else:
            self._forget()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _forget(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `run_server`: uvicorn would end by them, with a code that says nothing."""
        yield


def make_server(app: ASGIApp, shutdown_grace: float) -> uvicorn.Server:
    """Return a server for an app; when it is to end, requests have so many seconds to be answered."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_graceful_shutdown=math.ceil(shutdown_grace),
        h11_max_incomplete_event_size=_MOST_HEAD_BYTES,
    )
    return _Server(config)


def run_server(
    server: uvicorn.Server,
    scheduler: Scheduler,
    listener: Listener,
    failure: Callable[[], BaseException | None],
) -> int:
    """Serve until a signal comes or the model cannot be opened; returns the exit code.

    The first signal lets what was taken be answered, within the server's grace; the second ends the process at once.
    `failure` returns why the model is not open, once that is known.
    """
    received: list[int] = []

    def on_signal(signum: int) -> None:
        if received:
            os._exit(128 + signum)
        received.append(signum)
        scheduler.close()
        server.should_exit = True

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                loop.add_signal_handler(signum, on_signal, signum)
        watch = asyncio.ensure_future(_watch(server, scheduler, failure))
        try:
            await server.serve(sockets=[listener.socket])
        finally:
            watch.cancel()

    asyncio.run(serve())
    scheduler.abort()
    if (error := failure()) is not None:
        raise error
    ended = scheduler.join(_JOIN_SECONDS)
    code = 128 + received[0] if received else 1
    if not ended:  # it is in the middle of a layer, or of opening the model, and would be cut off anyhow
        listener.__exit__()
        os._exit(code)
    return code


async def _watch(server: uvicorn.Server, scheduler: Scheduler, failure: Callable[[], Any]) -> None:
    """Have the server end if the model cannot be opened."""
    while scheduler.session is None:
        if failure() is not None:
            server.should_exit = True
            return
        await asyncio.sleep(0.05)
