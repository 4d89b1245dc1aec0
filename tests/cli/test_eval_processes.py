"""`switchrun eval` in pipes and under signals, in a process of its own; its children answer without torch."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ANSWER = {
    "model": {"id": "demo", "revision": None, "stored_dtype": "BF16"},
    "text": {"passages": 1, "skipped": 0, "cut": 0, "input_tokens": 5, "target_tokens": 4},
    "row": {
        "dtype": "bf16", "compute_dtype": "bf16", "loss": 2.0, "passes": 1, "hidden_bytes": 100, "experts_used": 1,
        "open_seconds": 1.0, "peak_rss_bytes": 10**8, "expert_slots": 4, "slot_bytes": 1000,
        "loss_pass": {"seconds": 1.0, "expert_loads": 1, "load_bytes": 1000},
        "generation": {"seconds": 1.0, "expert_loads": 1, "load_bytes": 1000},
    },
    "predictions": [[1, 2, 3, 4]], "outputs": [[0, 1]],
    "warnings": ["the folder is full"], "repairs": ["a name was mended"],
}  # fmt: skip
SCRIPT = """
import sys, time
from switchrun.bench import evaluation
def run_child(module, task, **_):
    time.sleep({seconds})
    return {answer!r}
evaluation.run_child = run_child
from switchrun.cli.app import main
main()
"""


def start(env: dict[str, str], *options: str, seconds: float = 0) -> subprocess.Popen[bytes]:
    script = SCRIPT.format(answer=ANSWER, seconds=seconds)
    command = [sys.executable, "-c", script, "eval", "--text", "-", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe)


@pytest.mark.parametrize("style", ["table", "md", "json"])
def test_a_closed_pipe(hermetic: dict[str, str], style: str) -> None:
    process = start(hermetic, "--format", style)
    assert process.stdin
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    process.stdin.write(b"one line\n")
    process.stdin.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(30) == 141
    assert "warning: int8: the folder is full" in errors
    assert errors.count("note: a name was mended") == 1
    assert "Traceback" not in errors


def test_no_colours_and_no_notes_in_a_pipe(hermetic: dict[str, str]) -> None:
    process = start({**hermetic, "FORCE_COLOR": "1"}, "-q")
    output, errors = process.communicate(b"one line\n", 30)
    assert (process.returncode, errors) == (0, b"")
    assert b"\x1b" not in output


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal(hermetic: dict[str, str], tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = start(hermetic, seconds=30)
    assert process.stdin
    assert process.stderr
    process.stdin.write(b"one line\n")
    process.stdin.close()
    process.stdin = None
    assert process.stderr.readline() == b"switchrun: dtype 1 of 3: auto\n"
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (code, b"")
