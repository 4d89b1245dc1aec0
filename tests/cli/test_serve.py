"""`switchrun serve` as a process: how it begins, what it says, and how it ends."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunSwitchrun
from tests.servers import wait_for

BODY = json.dumps({"text": "A <extra_id_0> walks into a bar."})
Start = Callable[..., "tuple[subprocess.Popen[str], str]"]


@pytest.fixture
def start(hermetic: dict[str, str]) -> Iterator[Start]:
    """Start a server, and return it with its URL once it is ready."""
    started: list[subprocess.Popen[str]] = []

    def call(*options: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "switchrun", "serve", *options]
        process = subprocess.Popen(command, env=hermetic, stdout=-1, stderr=-1, text=True)
        started.append(process)
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        assert "listening on" in lines[0], lines
        assert "demo is ready at " in lines[1], lines
        return process, lines[1].split()[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


def post(url: str) -> tuple[int, Any]:
    with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)) as connection:
        connection.request("POST", "/v1/fill", BODY)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_what_was_taken_be_answered(start: Start, signum: signal.Signals, code: int) -> None:
    process, url = start("--port", "0")
    assert post(url)[1]["text"] == "A scandal walks into a bar."
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(post(url)))
    asking.start()
    wait_for(lambda: asked(url) or answers)
    process.send_signal(signum)
    asking.join(60)
    assert answers[0][0] == 200
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (code, "", "")


def asked(url: str) -> bool:
    with contextlib.closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)) as connection:
        connection.request("GET", "/metrics")
        return b"switchrun_queue_requests 1\n" in connection.getresponse().read()


def test_a_unix_socket_and_a_token(start: Start, tmp_path: Path) -> None:
    path, token = tmp_path / "socket", tmp_path / "token"
    token.write_text("secret\n")
    process, url = start("--socket", str(path), "--token-file", str(token), "--threads", "1")
    assert url == f"unix:{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for header, status in (("", 401), ("Authorization: Bearer secret\r\n", 200)):
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connection:
            connection.connect(str(path))
            connection.sendall(f"GET /ready HTTP/1.0\r\n{header}\r\n".encode())
            assert f" {status} ".encode() in connection.recv(1 << 16)
    process.terminate()
    assert process.wait(60) == 143
    assert not path.exists()


def test_one_that_cannot_open_its_model(run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["serve", "--model", "nowhere", "--port", "0"])
    assert done.returncode == 5
    assert done.stdout == ""
    assert "nowhere" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0: others could reach it (protect it with --token-file FILE)"),
        (["--host", "example.com"], "--host example.com: others could reach it"),
        (["--token-file", "none"], "--token-file none: No such file or directory"),
        (["--token-file", "/dev/null"], "--token-file /dev/null: it holds no token"),
        (["--port", "70000"], "--port"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
    ],
)
def test_options_that_make_no_sense(run_switchrun: RunSwitchrun, options: list[str], message: str) -> None:
    done = run_switchrun(["serve", *options])
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_the_extra(hermetic: dict[str, str]) -> None:
    script = (
        "import sys; sys.modules['starlette'] = sys.modules['uvicorn'] = None; sys.argv = ['switchrun', 'serve']\n"
        "from switchrun.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], env=hermetic, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "switchrun: serve needs uvicorn (pip install 'switchrun[serve]')\n"
