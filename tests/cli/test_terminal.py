"""What a person meets on a terminal: the line of progress, colours, and the prompt; the session is a fake."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from switchrun.output.terminal import width
from tests.cli.conftest import Invoke
from tests.conftest import ROOT
from tests.support.terminals import Terminal, left_on_screen, lines_drawn

TEXT = "A <extra_id_0> b"
PLAIN, COLOURED = "A wörd [x] b".encode(), "A \x1b[1;32mwörd [x]\x1b[0m b".encode()


@contextmanager
def start(env: dict[str, str], *args: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.cli.fakes", "fill", *args]
    env = {**env, "TERM": "xterm", **streams.pop("more", {})}
    with subprocess.Popen(command, cwd=ROOT, env=env, **streams) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("columns", [80, 120])
def test_a_fill(hermetic: dict[str, str], columns: int) -> None:
    with Terminal(columns) as terminal:
        args = (TEXT, "--model", "漢字" * 50)
        with start(hermetic, *args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal.theirs) as fill:
            output, _ = fill.communicate(timeout=60)
        seen = terminal.read()
    assert (fill.returncode, output) == (0, PLAIN + b"\n")
    drawn = lines_drawn(seen)
    assert drawn[0].startswith("opening 漢字")
    assert drawn[-1].startswith("token 3 of at most 64")
    assert all(width(line) < columns for line in drawn)
    assert left_on_screen(seen).count(b"\n") == left_on_screen(seen).count(b"switchrun: note: ") == 2


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("more", "answer", "drawn"),
    [({}, COLOURED, True), ({"NO_COLOR": "1"}, PLAIN, True), ({"TERM": "dumb", "FORCE_COLOR": "1"}, PLAIN, False)],
    ids=["colour", "no-color", "dumb"],
)
def test_answers_on_a_terminal(hermetic: dict[str, str], more: dict[str, str], answer: bytes, drawn: bool) -> None:
    with Terminal() as terminal:
        streams = {"stdin": subprocess.DEVNULL, "stdout": terminal.theirs, "stderr": terminal.theirs}
        with start(hermetic, TEXT, "--model", "org/tiny", more=more, **streams) as fill:
            assert fill.wait(60) == 0
        seen = terminal.read()
    screen = left_on_screen(seen)
    assert screen.endswith(answer + b"\n")
    assert bool(lines_drawn(seen)) == drawn
    if not drawn:
        assert b"\x1b" not in seen
        assert screen.startswith("opening tiny…\n".encode())


def test_a_prompt(hermetic: dict[str, str]) -> None:
    """Stdout has answers alone; a line can be edited and called back; Ctrl-D ends."""
    with Terminal() as terminal:
        streams = {"stdin": terminal.theirs, "stdout": subprocess.PIPE, "stderr": terminal.theirs}
        with start(hermetic, **streams) as fill:
            assert fill.stdout is not None
            terminal.wait_for(b"Ctrl-D ends\r\n")
            terminal.wait_for(b"\n> ")
            terminal.type(b"  \r")  # asks again
            terminal.type(TEXT.encode() + b"X\x7f\r")
            assert fill.stdout.readline() == PLAIN + b"\n"
            terminal.wait_for(b"> ", 3)
            terminal.type(b"\x1b[A\r")
            assert fill.stdout.readline() == PLAIN + b"\n"
            terminal.type(b"A <extra_id_0> c\n\xff <extra_id_0>\r")
            assert fill.stdout.readline() == "A wörd [x] c\n".encode()
            assert fill.stdout.readline() == b"\n"
            terminal.wait_for(b"line 4: not UTF-8")
            terminal.wait_for_editing()
            terminal.type(b"\x04")
            assert fill.stdout.read() == b""
            assert fill.wait(60) == 3
        assert terminal.echoes
        assert terminal.read().endswith(b"\n")


def test_ctrl_c_at_the_prompt(hermetic: dict[str, str]) -> None:
    with Terminal() as terminal:
        streams = {"stdin": terminal.theirs, "stdout": terminal.theirs, "stderr": terminal.theirs}
        with start(hermetic, **streams) as fill:
            terminal.wait_for(b"\n> ")
            terminal.wait_for_editing()
            fill.send_signal(signal.SIGINT)
            time.sleep(0.2)
            terminal.type(b"\r")  # it may not have been waiting for a key yet
            assert fill.wait(60) == 130
        assert terminal.echoes


@pytest.mark.slow
def test_a_quiet_prompt(hermetic: dict[str, str]) -> None:
    with Terminal() as terminal:
        streams = {"stdin": terminal.theirs, "stdout": subprocess.PIPE, "stderr": terminal.theirs}
        with start(hermetic, "-q", **streams) as fill:
            assert fill.stdout is not None
            terminal.type(TEXT.encode() + b"\n")
            assert fill.stdout.readline() == PLAIN + b"\n"
            terminal.wait_for_editing()
            terminal.type(b"\x04")
            assert fill.wait(60) == 0
        assert set(terminal.read().splitlines()) == {TEXT.encode()}  # echoed by the terminal, or by the line editor


def test_no_prompt_where_stderr_is_a_file(invoke: Invoke) -> None:
    assert "> " not in invoke("fill", input=TEXT.encode()).stderr
