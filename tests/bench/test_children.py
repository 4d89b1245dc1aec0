"""Children answer, fail with a reason, and are never left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from switchrun.bench.cgroup import MemoryGroup
from switchrun.bench.children import ChildError, run_child
from switchrun.errors import UsageError

STUB = "tests.bench.stub"


def gone(pid_file: Path) -> bool:
    return not Path(f"/proc/{pid_file.read_text()}").exists()


def test_what_libraries_print_is_not_in_the_answer(hermetic: dict[str, str]) -> None:
    assert run_child(STUB, {"do": "answer", "value": [1, "ä"]}, None) == {"answer": [1, "ä"]}


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
        run_child(STUB, {"do": do}, None)
    assert (caught.value.record["kind"], caught.value.record["exit_code"]) == (kind, code)
    assert message in caught.value.record["message"]


def test_a_child_that_takes_too_long_is_ended(hermetic: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ChildError, match="not done") as caught:
        run_child(STUB, {"do": "sleep", "pid_file": str(tmp_path / "pid")}, None, timeout=2)
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
        run_child(STUB, {"do": "sleep", "pid_file": str(tmp_path / "pid")}, None)
    assert gone(tmp_path / "pid")


def test_a_limited_child_is_in_a_group_that_is_removed(hermetic: dict[str, str]) -> None:
    limit = 300 * 1024**2
    try:
        with MemoryGroup(limit):
            pass
    except UsageError as error:
        pytest.skip(str(error))
    answer = run_child(STUB, {"do": "groups"}, limit)
    group = next(line for line in answer["groups"].splitlines() if "switchrun-bench" in line).rpartition(":")[2]
    assert 0 < int(answer["peak"]) <= limit
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{Path(group).name}"))
