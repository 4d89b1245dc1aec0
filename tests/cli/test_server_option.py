"""`fill`, `generate` and `score` with `--server`: answers of a warm demo model, pipes, signals, what goes wrong."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from switchrun import Filling, GenerationOptions, Session
from switchrun.output.sinks import FillFormat, format_result
from tests.cli.conftest import Invoke
from tests.conftest import ROOT, validate
from tests.servers import refusal, response, serving, stub, without_costs

TEXTS = ["A <extra_id_0> walks into a bar.", "The <extra_id_0> is <extra_id_1>."]
SHORT = ["--max-new-tokens", "6"]
NO_SENTINEL = "the text has no sentinel, so there is nothing to fill in"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("offload")
    return Session.open(cpu_memory="64GiB", offload_folder=folder, batch_size="auto", num_beams=4)


@pytest.fixture(scope="module")
def url(session: Session) -> Iterator[str]:
    with serving(session) as found:
        yield found.url


# What is answered.


@pytest.mark.parametrize("style", ["text", "raw"])
@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--num-beams", "2", *SHORT], GenerationOptions(max_new_tokens=6, num_beams=2)),
        (
            ["--sample", "--seed", "3", "--top-k", "9", *SHORT],
            GenerationOptions(sample=True, seed=3, top_k=9, max_new_tokens=6),
        ),
        (["--alternatives", "2", *SHORT], GenerationOptions(alternatives=2, max_new_tokens=6)),
    ],
)
def test_lines_are_those_of_a_session(
    invoke: Invoke, session: Session, url: str, style: str, flags: list[str], options: GenerationOptions
) -> None:
    outcome = invoke("fill", "--server", url, "--format", style, *flags, input="\n".join(TEXTS).encode())
    lines = options.alternatives or 1
    results = session.fill(TEXTS, options)
    assert outcome.stdout == "".join(format_result(result, FillFormat(style), lines) for result in results)
    assert (outcome.code, outcome.stderr, outcome.sessions) == (0, "", [])


@pytest.mark.parametrize("style", ["json", "jsonl"])
def test_records_are_those_of_a_session(invoke: Invoke, session: Session, url: str, style: str) -> None:
    outcome = invoke("fill", *TEXTS, "no", "--server", url, "--format", style, "--explain")
    assert (outcome.code, outcome.stderr) == (
        3,
        f"switchrun: text 3: {NO_SENTINEL} (write <extra_id_0> where words are missing, in the shell within quotes; "
        "or use --blank ___, or switchrun generate)\n",
    )
    found = (
        json.loads(outcome.stdout) if style == "json" else [json.loads(line) for line in outcome.stdout.splitlines()]
    )
    for record in found:
        validate(record, "fill")
    expected = [result.as_record() for result in session.fill(TEXTS, GenerationOptions(explain=True))]
    for one, other in zip(found, json.loads(json.dumps(expected)), strict=False):
        # The same experts with about the same probabilities: of what else the batch has, the last digit may depend.
        assert without_costs(one) | {"routing": 0} == without_costs(other) | {"routing": 0}
        for layer, same in zip(one["routing"]["layers"], other["routing"]["layers"], strict=True):
            assert layer["experts"] == same["experts"]
    assert found[2]["error"]["kind"] == "input"


def test_blanks_and_lines_that_fail(invoke: Invoke, session: Session, url: str) -> None:
    lines = "A ___ walks into a bar.\nno\n\xff\n".encode() + b"\xff\n" + TEXTS[0].replace("<extra_id_0>", "__").encode()
    outcome = invoke("fill", "--server", url, "--blank", "__", input=lines)
    answer = session.fill(TEXTS[0]).text
    assert (outcome.code, outcome.stdout) == (3, f"{answer}\n\n\n\n{answer}\n")
    assert [line.split(":")[1] for line in outcome.stderr.splitlines()] == [" line 2", " line 3", " line 4"]


def test_what_only_the_server_can_refuse(invoke: Invoke, session: Session, url: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(session, "_most_tokens", 20)
    long = "A <extra_id_0> " + "b " * 100
    outcome = invoke("fill", "--server", url, "--format", "jsonl", input=f"{long}\n{TEXTS[0]}\n".encode())
    assert outcome.code == 3
    assert outcome.stderr.startswith("switchrun: line 1: the text has 1")
    first, second = (json.loads(line) for line in outcome.stdout.splitlines())
    assert (first["id"], first["input"], first["error"]["kind"], second["id"]) == (0, long, "input", 1)
    alone = invoke("fill", "--server", url, long)
    assert (alone.code, alone.stdout, alone.stderr.count("\n")) == (4, "", 1)


def test_generate_and_score(invoke: Invoke, session: Session, url: str) -> None:
    outcome = invoke("generate", "Hello", "--server", url, "--prefix", "x: ", "--max-new-tokens", "9")
    options = session.own_options(max_new_tokens=9)
    assert outcome.stdout == session.generate("Hello", options, prefix="x: ").text + "\n"
    assert "demo answers in sentinels, so it looks pre-trained only" in outcome.stderr
    lines = "A <extra_id_0> b\tman\nA <extra_id_0>\n"
    outcome = invoke("score", "--server", url, input=lines.encode())
    filling = session.score(Filling("A <extra_id_0> b", ["man"]))
    assert outcome.stdout == format_result(filling, FillFormat.TEXT) + "\n"
    assert (outcome.code, outcome.stderr.count("\n")) == (3, 1)
    assert invoke("generate", "A", "--server", url, "--max-new-tokens", "1000").code == 6


def test_nothing_to_answer(invoke: Invoke, url: str) -> None:
    assert invoke("fill", "--server", url, "no").code == 4
    assert invoke("fill", "--server", url, "--format", "json").stdout == "[]\n"


def test_the_server_from_the_environment(invoke: Invoke, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables that stand for options of the server's are ignored, whatever they say."""
    monkeypatch.setenv("SWITCHRUN_SERVER", url)
    for name, value in {"MODEL": "/nowhere", "BATCH_SIZE": "x", "CPU_MEMORY": "x", "DTYPE": "int8"}.items():
        monkeypatch.setenv(f"SWITCHRUN_{name}", value)
    outcome = invoke("fill", TEXTS[0])
    assert (outcome.code, outcome.sessions) == (0, [])
    assert invoke("fill", TEXTS[0], "--model", "x").code == 2
    monkeypatch.setenv("SWITCHRUN_SERVER", "")
    monkeypatch.setenv("SWITCHRUN_BATCH_SIZE", "1")
    monkeypatch.setenv("SWITCHRUN_CPU_MEMORY", "6GiB")
    assert invoke("fill", TEXTS[0]).sessions[0].opening.model == "/nowhere"


# Options.


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("fill", "--model x"),
        ("fill", "-m x"),
        ("fill", "--dtype auto"),
        ("fill", "--cpu-memory 6GiB"),
        ("fill", "--gpu-memory 0"),
        ("fill", "--offload-folder x"),
        ("fill", "--offload-limit 1GB"),
        ("fill", "--device-map auto"),
        ("fill", "--tokenizer x"),
        ("fill", "--hub auto"),
        ("fill", "--network-bandwidth 1MB/s"),
        ("fill", "--batch-size 1"),
        ("fill", "--stats"),
        ("generate", "--batch-size auto"),
        ("score", "--stats"),
    ],
)
def test_options_of_the_server(invoke: Invoke, command: str, flags: str) -> None:
    flag, *value = flags.split()
    outcome = invoke(command, "A <extra_id_0>\tb", "--server", "http://127.0.0.1:1", flag, *value)
    flag = "--model" if flag == "-m" else flag
    assert (outcome.code, outcome.stdout) == (2, "")
    assert outcome.stderr == (
        f"switchrun: {flag} does nothing with a server, which has its own (leave out {flag} or --server)\n"
    )


@pytest.mark.parametrize(
    ("server", "code", "message"),
    [
        ("localhost:80", 2, "localhost:80 is no server's URL (write http://HOST:PORT, https://HOST or unix:PATH)"),
        (
            "http://127.0.0.1:1",
            8,
            "http://127.0.0.1:1 cannot be reached: Connection refused (start one: switchrun serve)",
        ),
        ("unix:none", 8, "unix:none cannot be reached: No such file or directory (start one: switchrun serve)"),
        ("unix:" + "x" * 200, 8, "cannot be reached: AF_UNIX path too long"),
    ],
)
def test_servers_that_are_not_there(invoke: Invoke, server: str, code: int, message: str) -> None:
    outcome = invoke("fill", "--server", server, TEXTS[0])
    assert (outcome.code, outcome.stdout, outcome.stderr.count("\n")) == (code, "", 1)
    assert message in outcome.stderr


def test_where_the_token_is_from(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[str] = []

    def answer(connection: socket.socket, head: str, _body: bytes) -> None:
        tokens.extend(line[22:] for line in head.split("\r\n") if line.startswith("Authorization: Bearer "))
        connection.sendall(refusal(401, "unauthorized"))

    (tmp_path / "token").write_text("of-file\n")
    (tmp_path / "bad").write_text("two words\n")
    with stub(answer) as url:
        monkeypatch.setenv("SWITCHRUN_TOKEN", "of-environment")
        outcome = invoke("fill", TEXTS[0], "--server", url)
        assert (outcome.code, outcome.stderr) == (
            2,
            f"switchrun: {url}: the token is missing or wrong (set SWITCHRUN_TOKEN, or use --token-file FILE)\n",
        )
        invoke("fill", TEXTS[0], "--server", url, "--token-file", "token")
        monkeypatch.setenv("SWITCHRUN_TOKEN", "two words")
        assert invoke("fill", TEXTS[0], "--server", url).stderr.startswith("switchrun: the token is empty, or")
        assert invoke("fill", TEXTS[0], "--server", url, "--token-file", "bad").code == 2
        assert invoke("fill", TEXTS[0], "--server", url, "--token-file", "none").code == 2
    assert tokens == ["of-environment", "of-file"]
    outcome = invoke("fill", TEXTS[0], "--token-file", "token")
    assert (outcome.code, outcome.stderr) == (
        2,
        "switchrun: --token-file does nothing without --server (add --server)\n",
    )


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x1b[31m", 8),
        (response(b"<html>", 502), 8),
        (response({}, 302, Location="http://x"), 8),
        (refusal(404, "request"), 8),
        (refusal(500, "internal"), 1),
        (refusal(500, "corrupt"), 7),
        (refusal(403, "\x1b[31m"), 8),
    ],
)
def test_servers_that_are_none(invoke: Invoke, data: bytes, code: int) -> None:
    with stub(lambda connection, _head, _body: connection.sendall(data)) as url:
        outcome = invoke("fill", "--server", url, TEXTS[0])
    assert (outcome.code, outcome.stdout, outcome.stderr.count("\n")) == (code, "", 1)
    assert "\x1b" not in outcome.stderr
    assert "internal error" not in outcome.stderr


def test_a_note_while_the_server_opens_its_model(invoke: Invoke) -> None:
    opening = response({"status": "opening"}, 503)
    answers = iter([opening, opening, response({"status": "ready"}), refusal(422, "storage")] * 2)
    with stub(lambda connection, _head, _body: connection.sendall(next(answers))) as url:
        outcome = invoke("fill", "--server", url, TEXTS[0])
        assert (outcome.code, outcome.stderr.splitlines()) == (
            9,
            [f"switchrun: {url} is still opening its model", "switchrun: it is so (do this)"],
        )
        assert invoke("fill", "--server", url, TEXTS[0], "-q").stderr == "switchrun: it is so (do this)\n"


# In a process of its own.


def test_each_line_is_answered_before_the_next_comes_and_without_torch(
    hermetic: dict[str, str], session: Session, url: str
) -> None:
    code = (
        "import sys\nfrom switchrun.cli.app import run\nassert run(sys.argv[1:]) == 0\n"
        "print(sorted({'torch', 'transformers', 'accelerate', 'starlette', 'numpy', 'rich'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "fill", "--server", url]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=hermetic, bufsize=0, **pipes) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(2):
            process.stdin.write(f"{TEXTS[0]}\n".encode())
            assert process.stdout.readline().decode() == session.fill(TEXTS[0]).text + "\n"
        process.stdin.close()
        assert process.stdout.read() == b"[]\n"


def test_ctrl_c_closes_the_connection(hermetic: dict[str, str]) -> None:
    asked, gone = threading.Event(), threading.Event()

    def answer(connection: socket.socket, head: str, _body: bytes) -> None:
        if head.startswith("GET"):
            connection.sendall(response({"status": "ready"}))
            return
        asked.set()
        with contextlib.suppress(ConnectionResetError):
            connection.recv(1)
        gone.set()

    with stub(answer) as url:
        command = [sys.executable, "-m", "switchrun", "fill", "--server", url, TEXTS[0]]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, env=hermetic, **pipes) as process:
            assert asked.wait(60)
            assert not gone.is_set()
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == (b"", b"")
        assert process.returncode == 130
        assert gone.wait(60)
