"""Children import nothing of the current folder, and end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from switchrun.machine.children import end, start_python

#: Of the standard library, of what switchrun imports itself, and of what that imports.
NAMES = (
    "json",
    "runpy",
    "ctypes",
    "typing",
    "psutil",
    "numpy",
    "torch",
    "rich",
    "transformers",
    "sitecustomize",
    "switchrun",
)


@pytest.fixture
def traps(tmp_path: Path) -> Path:
    """The current folder is full of modules that write a file."""
    mark = tmp_path / "ran"
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write({name!r})\n")
    return mark


def run(module: str, folder: Path | None = None) -> tuple[int, bytes, bytes]:
    child = start_python(module, folder=folder)
    output, errors = child.communicate(timeout=30)
    return child.returncode, output, errors


def test_nothing_of_the_current_folder_is_imported(traps: Path, tmp_path: Path) -> None:
    # It ends with an error, since it is given no task, when it has imported all that it needs for one.
    code, _, errors = run("switchrun.cli.child")
    assert code == 1
    assert b"JSONDecodeError" in errors
    assert not traps.exists()


def test_nor_by_what_a_child_starts(traps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "parent.py").write_text(
        "import subprocess, sys\n"
        "subprocess.run([sys.executable, '-c', 'import json, sys; print(sys.path)'], check=True)\n"
        "subprocess.run([sys.executable, '-m', 'json.tool', '--help'], check=True)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    code, output, errors = run("parent")
    assert (code, errors) == (0, b"")
    assert b"''" not in output.splitlines()[0]
    assert not traps.exists()


def test_the_package_need_not_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH")
    assert b"JSONDecodeError" in run("switchrun.cli.child")[2]


def test_the_folder_that_the_caller_names_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "where.py").write_text(
            f"import os; print({place!r}, os.getcwd() == os.path.dirname(__file__))"
        )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "second"))
    assert run("where", tmp_path / "first") == (0, b"first True\n", b"")
    assert run("where") == (0, b"second False\n", b"")


def test_a_python_that_is_gone_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "updated" / "python"))
    assert b"JSONDecodeError" in run("switchrun.cli.child")[2]


def is_gone(pid: int) -> bool:
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == b"Z":
            return True
        time.sleep(0.05)
    return False


def test_a_child_dies_with_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = tmp_path / "pid"
    (tmp_path / "sleeper.py").write_text(
        f"import os, time\nopen({str(note) + '.new'!r}, 'w').write(str(os.getpid()))\n"
        f"os.rename({str(note) + '.new'!r}, {str(note)!r})\ntime.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ['PYTHONPATH']}")
    script = "from switchrun.machine.children import start_python\nstart_python('sleeper').wait()"
    parent = subprocess.Popen([sys.executable, "-c", script])
    while not note.exists():
        assert parent.poll() is None
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert is_gone(int(note.read_text()))


def test_the_end_of_a_child_is_that_of_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "starter.py").write_text(
        "import subprocess, sys, time\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = start_python("starter")
    assert child.stdout is not None
    grandchild = int(child.stdout.readline())
    end(child)
    assert child.returncode == -signal.SIGKILL
    assert is_gone(grandchild)
