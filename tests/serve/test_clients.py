"""Clients that are many, slow, rude or gone, and others' web pages: nothing hangs, grows, or gets through."""

from __future__ import annotations

import contextlib
import json
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from switchrun import Session
from switchrun.errors import CorruptCheckpointError, StorageError, UsageError
from switchrun.serve import app, server
from switchrun.serve.server import Listener
from tests.serve.conftest import Gate
from tests.servers import Served, serving, wait_for

TEXT = "a <extra_id_0> walks into a bar"
BODY = json.dumps({"text": TEXT, "max_new_tokens": 3}).encode()
HEAD = b"POST /v1/fill HTTP/1.1\r\nHost: 127.0.0.1\r\n"


def rest_of(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    found = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(1 << 16):
            found += piece
    return bytes(found)


def count_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def gone_from(served: Served) -> None:
    """Wait until nothing waits, and nobody is connected."""
    wait_for(lambda: served.scheduler.tally()[2] == 0 and not served.server.server_state.connections)


# Who may ask.


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:8080"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
    ],
)
def test_pages_of_others_reach_nothing(served: Served, headers: dict[str, str], status: int) -> None:
    answer = served.ask("POST", "/v1/fill", BODY, **headers)
    assert answer.status == status
    assert "access-control-allow-origin" not in {name.lower() for name in answer.headers}
    assert served.ask("GET", "/health", **headers).status == status


def test_the_token(session: Session) -> None:
    with serving(session, token="secret") as served:
        for path in ("/health", "/"):
            assert served.ask("GET", path).status == 200
        for path in ("/ready", "/metrics", "/v1/models", "/openapi.json", "/none"):
            refused = served.ask("GET", path)
            assert (refused.status, refused.record["error"]["kind"]) == (401, "unauthorized")
        for header in ("secret", "Bearer", "Bearer secre", "Bearer secrets", "bearer secret", "Bearer sécret"):
            assert served.ask("POST", "/v1/fill", BODY, Authorization=header).status == 401
        assert served.ask("POST", "/v1/fill", BODY, Authorization="Bearer secret").status == 200
        assert served.ask("POST", "/v1/fill", BODY, Host="any", Authorization="Bearer secret").status == 200


# The queue.


def test_a_full_queue_says_when_to_come_again(session: Session, gate: Gate) -> None:
    with serving(session, max_queue=2) as served, ThreadPoolExecutor(3) as pool:
        first = pool.submit(served.ask, "POST", "/v1/fill", BODY)
        wait_for(lambda: gate.batches)
        waiting = [pool.submit(served.ask, "POST", "/v1/fill", BODY) for _ in range(2)]
        wait_for(lambda: served.scheduler.tally()[2] == 3)
        refused = served.ask("POST", "/v1/fill", BODY)
        assert (refused.status, refused.headers["retry-after"], refused.record["error"]["kind"]) == (429, "1", "busy")
        gate.opened.set()
        assert [each.result().status for each in (first, *waiting)] == [200] * 3
        assert gate.batches == [1, 2], "what came meanwhile is answered together"


def test_closing_answers_what_was_taken(session: Session, gate: Gate) -> None:
    with serving(session) as served, ThreadPoolExecutor(1) as pool:
        taken = pool.submit(served.ask, "POST", "/v1/fill", BODY)
        wait_for(lambda: gate.batches)
        served.scheduler.close()
        assert served.ask("POST", "/v1/fill", BODY).status == 503
        assert served.ask("GET", "/ready").status == 503
        gate.opened.set()
        assert taken.result().status == 200
        assert served.scheduler.join(30)


def test_what_waits_when_it_is_aborted(session: Session, gate: Gate) -> None:
    with serving(session) as served, ThreadPoolExecutor(2) as pool:
        working = pool.submit(served.ask, "POST", "/v1/fill", BODY)
        wait_for(lambda: gate.batches)
        waiting = pool.submit(served.ask, "POST", "/v1/fill", BODY)
        wait_for(lambda: served.scheduler.tally()[2] == 2)
        served.scheduler.abort()
        assert waiting.result().status == 503
        gate.opened.set()
        assert working.result().status == 503


# Clients that leave.


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_costs_nothing_more(session: Session, gate: Gate, stream: bool) -> None:
    with serving(session) as served:
        blocked = served.connect()
        blocked.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        wait_for(lambda: gate.batches)
        body = json.dumps({"text": TEXT, "max_new_tokens": 16, "stream": stream}).encode()
        leaving = served.connect()
        leaving.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: served.scheduler.tally()[2] == 2)
        leaving.close()
        blocked.close()
        wait_for(lambda: served.scheduler.tally()[2] == 1)  # what waited is forgotten; what is worked on ends soon
        gate.opened.set()
        gone_from(served)
        assert served.scheduler.tally()[0].cancelled_rows == 2
        assert gate.batches == [1]
        assert served.post("/v1/fill", text=TEXT, max_new_tokens=2).status == 200


def test_one_that_leaves_does_not_take_the_others_along(session: Session, gate: Gate) -> None:
    with serving(session) as served, ThreadPoolExecutor(3) as pool:
        first = pool.submit(served.ask, "POST", "/v1/fill", BODY)
        wait_for(lambda: gate.batches)
        stays = pool.submit(served.post, "/v1/fill", text=TEXT, max_new_tokens=9)
        wait_for(lambda: served.scheduler.tally()[2] == 2)
        leaves = served.connect()
        leaves.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
        wait_for(lambda: served.scheduler.tally()[2] == 3)
        answer_batch, together = session.answer_batch, []

        def leave(inputs: Any, options: Any, ids: Any, controls: Any) -> Any:
            together.append(len(inputs))
            if len(inputs) == 2:
                leaves.close()
                wait_for(lambda: any(control.stopped for control in controls))
            return answer_batch(inputs, options, ids, controls)

        session.answer_batch = leave  # type: ignore[method-assign]
        gate.opened.set()
        assert first.result().status == 200
        assert stays.result().status == 200
        assert together == [2]
        alone = served.post("/v1/fill", text=TEXT, max_new_tokens=9)
        assert stays.result().record["output_ids"] == alone.record["output_ids"]


# What fails.


def test_a_damaged_expert_fails_its_batch_alone(
    session: Session, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise CorruptCheckpointError("expert 3 is damaged")

    with monkeypatch.context() as patched:
        patched.setattr(session.engine, "generate", fail)
        for body in ({"text": TEXT}, {"texts": [TEXT] * 2}):
            answer = served.post("/v1/fill", **body)
            assert (answer.status, answer.record["error"]["kind"]) == (500, "corrupt")
    assert served.post("/v1/fill", text=TEXT, max_new_tokens=2).status == 200
    assert served.scheduler.tally()[0].failed_rows == 3


def test_a_bug_has_a_number_and_ends_nothing(session: Session, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(session.engine, "generate", lambda *_, **__: 1 / 0)
        answer = served.post("/v1/fill", text=TEXT)
    assert (answer.status, answer.record["error"]["id"]) == (500, "bug1")
    assert "division" not in answer.body.decode()
    assert isinstance(served.bugs[0], ZeroDivisionError)
    with monkeypatch.context() as patched:
        patched.setattr(app, "exposition", lambda *_: 1 / 0)
        assert served.ask("GET", "/metrics").record["error"]["id"] == "bug2"
    assert served.post("/v1/fill", text=TEXT, max_new_tokens=2).status == 200


# Bodies and connections.


def test_bodies_that_are_too_large(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MOST_BODY_BYTES", 10_000)
    assert served.ask("POST", "/v1/fill", b" " * 20_000).status == 413
    with contextlib.closing(served.connect()) as connection:  # without a length, and without an end
        connection.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                connection.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
        assert b" 413 " in rest_of(connection)
    gone_from(served)


def test_slow_heads_and_bodies(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_HEAD_SECONDS", 0.3)
    monkeypatch.setattr(app, "_BODY_SECONDS", 0.3)
    with contextlib.closing(served.connect()) as silent, contextlib.closing(served.connect()) as slow:
        slow.sendall(HEAD[:20])
        assert rest_of(silent) == rest_of(slow) == b""
    with contextlib.closing(served.connect()) as connection:
        connection.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert b" 408 " in rest_of(connection)
    gone_from(served)


def test_heads_that_are_no_http_or_too_long(served: Served) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01", HEAD + b"X: " + b"x" * 100_000, b"GET / HTTP/9.9\r\n\r\n"):
        with contextlib.closing(served.connect()) as connection:
            connection.sendall(sent + b"\r\n\r\n")
            assert b" 400 " in rest_of(connection)
    gone_from(served)


def test_requests_one_after_another_on_a_connection(served: Served) -> None:
    one = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    with contextlib.closing(served.connect()) as connection:
        connection.sendall(one * 3 + HEAD.replace(b"POST /v1/fill", b"GET /health") + b"Connection: close\r\n\r\n")
        answers = rest_of(connection)
    assert answers.count(b"HTTP/1.1 200 OK") == 4
    assert answers.count(b'"output_ids"') == 3


def test_one_that_never_reads(session: Session) -> None:
    """What is overtaken is not kept for it."""
    with serving(session) as served:
        body = json.dumps({"texts": [TEXT] * 200, "max_new_tokens": 16, "stream": True}).encode()
        with contextlib.closing(socket.socket()) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", served.port))
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            wait_for(lambda: served.scheduler.tally()[0].rows == 200, 60)
            assert served.post("/v1/fill", text=TEXT, max_new_tokens=2).status == 200
        gone_from(served)


def test_many_at_once_leave_nothing_behind(served: Served) -> None:
    def ask(number: int) -> int:
        return served.post("/v1/fill", text=TEXT if number % 5 else "none", max_new_tokens=1 + number % 7).status

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(32)))
        gone_from(served)
        before, threads = count_fds(), threading.active_count()
        assert [*pool.map(ask, range(100))] == [422 if number % 5 == 0 else 200 for number in range(100)]
        gone_from(served)
    assert count_fds() <= before
    assert threading.active_count() <= threads


# Sockets.


def test_a_unix_socket_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Listener("", 0, path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert listener.url == f"unix:{path}"
        listener.socket.listen()
        with pytest.raises(UsageError, match="another server listens on"):
            Listener("", 0, path)
    assert not path.exists()
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    with Listener("", 0, path):  # one that nobody listens on
        pass
    path.write_text("a file")
    with pytest.raises(StorageError, match="in use"):
        Listener("", 0, path)
    assert path.read_text() == "a file"


def test_a_port_that_is_taken() -> None:
    with Listener("127.0.0.1", 0, None) as listener:
        listener.socket.listen()
        with pytest.raises(UsageError, match="cannot be listened on: Address already in use"):
            Listener("127.0.0.1", listener.socket.getsockname()[1], None)
    with pytest.raises(UsageError, match="cannot be listened on"):
        Listener("no.such.host.invalid", 1, None)
