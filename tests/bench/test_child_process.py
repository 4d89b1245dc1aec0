"""Children answer, fail with a reason, and are never left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from switchrun.bench.child_process import ChildError, run_child

STUB = "tests.bench.stub"


def gone(pid_file: Path) -> bool:
    return not Path(f"/proc/{pid_file.read_text()}").exists()


def test_what_libraries_print_is_not_in_the_answer(hermetic: dict[str, str]) -> None:
    assert run_child(STUB, {"do": "answer", "value": [1, "ä"]}) == {"answer": [1, "ä"]}


@pytest.mark.parametrize(
    ("do", "kind", "code", "message"),
    [
        ("budget", "budget", 6, "too small"),
        ("crash", "crash", 1, "ZeroDivisionError: a bug"),
        ("die", "killed", 6, "killed"),
    ],
)
def test_failures_have_a_reason(hermetic: dict[str, str], do: str, kind: str, code: int, message: str) -> None:
    with pytest.raises(ChildError) as caught:
        run_child(STUB, {"do": do})
    assert (caught.value.record["kind"], caught.value.record["exit_code"]) == (kind, code)
    assert message in caught.value.record["message"]


def test_a_child_that_takes_too_long_is_ended(hermetic: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ChildError, match="not done") as caught:
        run_child(STUB, {"do": "sleep", "pid_file": str(tmp_path / "pid")}, timeout=2)
    assert caught.value.record["kind"] == "timeout"
    assert gone(tmp_path / "pid")


def test_an_interrupt_ends_the_child(hermetic: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    real = subprocess.Popen.communicate

    def interrupted(self, data=None, timeout=None):
        if data is None:
            return real(self)
        self.stdin.write(data)
        self.stdin.flush()
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_child(STUB, {"do": "sleep", "pid_file": str(tmp_path / "pid")})
    assert gone(tmp_path / "pid")


def test_where_a_child_runs_and_who_is_told_of_it(hermetic: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "nearby.py").write_text(
        "import os\nfrom switchrun.bench.child_process import answer_task\n"
        "answer_task(lambda task, report: {'pid': os.getpid(), 'folder': os.getcwd()})\n"
    )
    pids: list[int] = []
    answer = run_child("nearby", {}, folder=tmp_path / "elsewhere", on_start=pids.append)
    assert answer == {"pid": pids[0], "folder": str(tmp_path / "elsewhere")}


def test_a_child_whose_start_fails_is_ended(hermetic: dict[str, str]) -> None:
    pids: list[int] = []

    def refuse(pid: int) -> None:
        pids.append(pid)
        raise OSError("no group")

    with pytest.raises(OSError, match="no group"):
        run_child(STUB, {"do": "sleep"}, on_start=refuse)
    assert not Path(f"/proc/{pids[0]}").exists()


def test_how_far_a_child_is() -> None:
    said: list[Any] = []
    assert run_child(STUB, {"do": "report", "value": 1.2}, on_step=said.append) == {"answer": 1.2}
    assert said[-1] == {"stage": "decode", "done": 2, "total": 12, "load_bytes": 0, "hub_bytes": 0, "ids": []}
