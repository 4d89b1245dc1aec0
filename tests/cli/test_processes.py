"""Pipes and signals: the command in a process of its own, with a fake session (so without torch)."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.fakes import REPAIR, UNUSED
from tests.conftest import ROOT
from tests.support.terminals import left_on_screen

LINE = b"A <extra_id_0> b\n"
ANSWER = "A wörd [x] b\n".encode()

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(hermetic: dict[str, str]) -> Iterator[Start]:
    """Give a function that starts the fake command with pipes; what still runs at the end is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def call(*args: str, delay: float = 0, **options: Any) -> subprocess.Popen[bytes]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-m", "tests.cli.fakes", *args]
        env = {**hermetic, "FAKE_DELAY": str(delay)}
        started.append(subprocess.Popen(command, cwd=ROOT, env=env, bufsize=0, **{**pipes, **options}))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None and not stream.closed:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def test_each_line_is_answered_before_the_next_comes(start: Start) -> None:
    process = start("fill", "-q")
    assert process.stdin is not None
    assert process.stdout is not None
    for _ in range(3):
        process.stdin.write(LINE)
        process.stdin.flush()
        assert process.stdout.readline() == ANSWER
    process.stdin.close()
    assert process.wait(60) == 0


def test_what_has_come_is_answered_together(start: Start) -> None:
    """But a line that has begun is not waited for, and 500 lines are not 500 fills."""
    process = start("fill", "-q", delay=0.3)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(LINE * 2 + LINE[:5])
    assert [process.stdout.readline() for _ in range(2)] == [ANSWER] * 2
    begun = time.monotonic()
    process.stdin.write(LINE[5:] + LINE * 499)
    process.stdin.close()
    assert process.stdout.read() == ANSWER * 500
    assert process.wait(60) == 0
    assert time.monotonic() - begun < 0.3 * 10


def test_a_given_number_of_lines_is_waited_for(start: Start) -> None:
    process = start("fill", "-q", "--batch-size", "2")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(LINE)
    assert select.select([process.stdout], [], [], 0.7)[0] == []
    process.stdin.write(LINE)
    assert process.stdout.readline() == ANSWER


def test_utf8_whatever_the_locale(start: Start, monkeypatch: pytest.MonkeyPatch, hermetic: dict[str, str]) -> None:
    hermetic |= {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    process = start("fill", "-q")
    stdout, stderr = process.communicate("<extra_id_0> größer\n".encode(), timeout=60)
    assert (stdout, stderr) == ("wörd [x] größer\n".encode(), b"")


def test_a_text_argument_that_is_not_utf8(start: Start, hermetic: dict[str, str]) -> None:
    command = [os.fsencode(sys.executable), b"-m", b"tests.cli.fakes", b"fill", b"\xff <extra_id_0>"]
    done = subprocess.run(command, cwd=ROOT, env=hermetic, capture_output=True)
    assert (done.returncode, done.stdout) == (4, b"")
    assert b"not UTF-8" in done.stderr


def test_head_ends_the_run_quietly(start: Start) -> None:
    # One by one: the answers of a larger batch fit into the pipe at once, and the run could be over before head is.
    process = start("fill", "-q", "--batch-size", "1", delay=0.02)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(LINE * 200)
    process.stdin.close()
    assert process.stdout.readline() == ANSWER
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_head_on_help(hermetic: dict[str, str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, "-m", "switchrun", "fill", "--help"], env=hermetic, stdout=write_end, stderr=subprocess.PIPE
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_a_full_disk(start: Start) -> None:
    with open("/dev/full", "wb") as full:
        process = start("fill", "-q", LINE.decode(), stdout=full)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr == b"switchrun: cannot write the answer to stdout: No space left on device\n"


@pytest.mark.parametrize(
    ("closed", "code", "message"),
    [(0, 2, b"stdin is closed"), (1, 2, b"stdout is closed"), (2, 0, b"")],
    ids=["stdin", "stdout", "stderr"],
)
def test_closed_streams(start: Start, closed: int, code: int, message: bytes) -> None:
    process = start("fill", *([] if closed == 0 else ["<extra_id_0>"]), preexec_fn=lambda: os.close(closed))
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert message in stderr
    assert stdout == (b"" if code else "wörd [x]\n".encode())


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_leave_whole_lines(start: Start, signum: signal.Signals, code: int) -> None:
    process = start("fill", "-q", delay=0.005)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(LINE * 2000)
    process.stdin.flush()
    first = process.stdout.readline()
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert set((first + stdout).splitlines(keepends=True)) == {ANSWER}
    assert stderr == b""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_signal_while_the_reader_is_slow_leaves_whole_lines(
    start: Start, unbuffered: str, hermetic: dict[str, str]
) -> None:
    hermetic |= {"PYTHONUNBUFFERED": unbuffered}
    # The answer is larger than the pipe, so the signal meets a write that is half done.
    long = "x" * 300_000
    process = start("fill", "-q")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{long} <extra_id_0>\n".encode())
    process.stdin.flush()
    start_of_line = process.stdout.read(10)
    process.send_signal(signal.SIGTERM)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    lines = (start_of_line + stdout).splitlines(keepends=True)
    assert set(lines) == {f"{long} wörd [x]\n".encode()}


def test_a_second_signal_kills_at_once(start: Start) -> None:
    # Nobody reads the answer, so the first signal waits for a write that cannot end.
    process = start("fill", "-q")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"x" * 300_000 + b" <extra_id_0>\n")
    process.stdin.flush()
    process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT


def test_a_signal_while_waiting_for_a_person(start: Start) -> None:
    process = start("fill", "-q")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(LINE)
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130


def test_progress_on_a_terminal_never_mixes_with_the_answer(start: Start) -> None:
    ours, theirs = pty.openpty()
    process = start("fill", stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert process.stdin is not None
    process.stdin.write(LINE * 2)
    process.stdin.close()
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # Linux says EIO when the other end is closed
        pass
    os.close(ours)
    assert process.wait(60) == 0
    assert "lines 1–2: token 3 of at most 64".encode() in seen
    shown = re.sub(rb"\x1b\[[\d;]*m", b"", left_on_screen(seen))
    assert shown == f"switchrun: note: {REPAIR}\nswitchrun: note: {UNUSED}\n".encode() + ANSWER * 2


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_the_command_line_is_imported(
    hermetic: dict[str, str], signum: signal.Signals, code: int
) -> None:
    script = (
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(name, path, target=None):\n"
        f"        if name == 'typer': os.kill(os.getpid(), {int(signum)})\n"
        "sys.meta_path.insert(0, Finder)\n"
        "sys.argv = ['switchrun', 'plan']\n"
        "from switchrun.__main__ import main\n"
        "assert 'typer' not in sys.modules\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=hermetic, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


SWALLOWS = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    sum(range(1000))
except BaseException:
    pass
"""
DELETES = """
import os, signal
class Odd:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))
odd = Odd()
del odd
"""


def run_script(env: dict[str, str], script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)


def fill_with(env: dict[str, str], first: str, *texts: str) -> subprocess.CompletedProcess[str]:
    """Run `fill` with a session that does something first, which is Python at work."""
    indented = first.strip().replace("\n", "\n        ")
    script = (
        "import sys\nimport tests.cli.fakes as fakes\nimport switchrun.cli.answering\n"
        f"class Session(fakes.FakeSession):\n    def fill(self, *args, **kwargs):\n        {indented}\n"
        "        return super().fill(*args, **kwargs)\n"
        "switchrun.cli.answering.open_session = Session\n"
        f"sys.argv = ['switchrun', 'fill', '-q', *{texts!r}]\n"
        "from switchrun.cli.app import main\nmain()\n"
    )
    return run_script(env, script)


@pytest.mark.parametrize("swallow", [SWALLOWS, DELETES], ids=["except", "del"])
def test_a_signal_that_an_imported_library_swallows(hermetic: dict[str, str], tmp_path: Path, swallow: str) -> None:
    """A torch that swallows it, and fails for another reason later."""
    (tmp_path / "torch.py").write_text(f"{swallow}\nraise RuntimeError('half of torch is there')\n")
    env = hermetic | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "switchrun", "fill", "A <extra_id_0> b"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize("swallow", [SWALLOWS, DELETES], ids=["except", "del"])
@pytest.mark.parametrize("then", ["raise ValueError('a library made this of it')", "sys.exit(7)", "pass"])
def test_a_signal_that_a_library_swallows_at_work(hermetic: dict[str, str], swallow: str, then: str) -> None:
    done = fill_with(hermetic, swallow + then, "<extra_id_0>", "<extra_id_0>")
    assert (done.returncode, done.stderr) == (130, "")
    assert set(done.stdout.splitlines()) <= {"wörd [x]"}


def test_a_signal_after_the_last_answer(hermetic: dict[str, str]) -> None:
    script = (
        "import atexit, os, signal, sys\nimport tests.cli.fakes as fakes\nimport switchrun.cli.answering\n"
        "from switchrun.cli import streams\n"
        "leave = streams.leave\n"
        "def interrupted(code):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    leave(code)\n"
        "streams.leave = interrupted\n"
        "switchrun.cli.answering.open_session = fakes.FakeSession\n"
        "sys.argv = ['switchrun', 'fill', '-q', '<extra_id_0>']\n"
        "from switchrun.__main__ import main\nmain()\n"
    )
    done = run_script(hermetic, script)
    assert (done.returncode, done.stdout, done.stderr) == (130, "wörd [x]\n", "")


@pytest.mark.parametrize("moment", ["libtorch_cpu.so", "tokenizers.abi3.so", "answer"])
def test_a_signal_at_a_moment_of_a_real_fill(hermetic: dict[str, str], moment: str) -> None:
    """While torch is loaded, while transformers is imported, and right after an answer."""
    command = [sys.executable, "-m", "switchrun", "fill", "-q"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=hermetic, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin
        assert process.stdout
        process.stdin.write(b"A <extra_id_0> b\n")
        process.stdin.flush()
        if moment == "answer":
            process.stdout.readline()
        while moment != "answer" and moment.encode() not in Path(f"/proc/{process.pid}/maps").read_bytes():
            assert process.poll() is None
            time.sleep(0.005)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert (process.returncode, stdout, stderr) == (130, b"", b"")
        assert time.monotonic() - start < 5  # one, if nothing else runs on the machine


def test_what_libraries_print_is_no_answer(hermetic: dict[str, str]) -> None:
    prints = (
        "import os, subprocess\nprint('by Python')\nos.write(1, b'by C\\n')\nsubprocess.run(['echo', 'by a child'])"
    )
    done = fill_with(hermetic, prints, "<extra_id_0>")
    assert (done.returncode, done.stdout) == (0, "wörd [x]\n")
    assert sorted(done.stderr.splitlines()) == ["by C", "by Python", "by a child"]


@pytest.mark.parametrize("args", [["plan"], ["offload", "ls"], ["plan", "--format", "json"]])
def test_a_table_for_a_closed_stdout(start: Start, args: list[str]) -> None:
    process = start(*args, preexec_fn=lambda: os.close(1))
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert stderr.startswith(b"switchrun: stdout is closed")


def test_no_file_takes_the_place_of_a_closed_stream(hermetic: dict[str, str]) -> None:
    script = (
        "import os, sys\nfrom switchrun.cli.streams import prepare_output\nprepare_output()\n"
        "file = os.open('/dev/zero', os.O_RDONLY)\n"
        "sys.exit(file)"
    )
    close = lambda: [os.close(number) for number in range(3)]  # noqa: E731
    done = subprocess.run([sys.executable, "-c", script], env=hermetic, preexec_fn=close)
    assert done.returncode == 3


def test_a_current_folder_that_was_deleted(hermetic: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = ["sh", "-c", 'cd gone && rmdir ../gone && exec "$0" -m switchrun plan', sys.executable]
    done = subprocess.run(command, env=hermetic, cwd=tmp_path, capture_output=True, text=True)
    message = "switchrun: the current folder was deleted (go to one that is there)\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ["fill", "A <extra_id_0> b."],
        ["doctor"],
        ["eval", "--text", "text", "--dtype", "bf16"],
        ["bench", "--repeats", "1", "--output-tokens", "2", "-q"],
    ],
    ids=lambda args: args[0],
)
def test_no_module_of_the_current_folder_is_imported(hermetic: dict[str, str], tmp_path: Path, args: list[str]) -> None:
    for name in ("psutil", "torch", "rich", "numpy", "json", "typing", "safetensors", "sitecustomize", "switchrun"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'a').write(__name__)\n")
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    (tmp_path / "text").write_text("The river was warm after the rain and the man left.\n")
    command = [sys.executable, "-P", "-m", "switchrun", *args]
    done = subprocess.run(command, env=hermetic, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()
