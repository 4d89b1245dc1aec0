"""`switchrun doctor` as a command: exit codes, formats, signals, and that torch stays in its own process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from switchrun.doctor import Check
from switchrun.errors import ModelError, NetworkError
from tests.cli.conftest import Invoke
from tests.conftest import RunSwitchrun, validate

SECRET = "hf_doNotShowThisToAnybody"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Check], list[dict[str, Any]]]:
    """Checks that the command shows, for a test to add to, and what it was asked to examine."""
    checks: list[Check] = [Check("torch", "fine")]
    questions: list[dict[str, Any]] = []

    def examine(offload_folder: Path, model: str | None, **options: Any) -> list[Check]:
        questions.append({"model": model, **options})
        return checks

    monkeypatch.setattr("switchrun.doctor.examine", examine)
    monkeypatch.setattr("switchrun.cli.doctor.quieten_libraries", lambda: None)
    return checks, questions


Asked = tuple[list[Check], list[dict[str, Any]]]


def test_warnings_are_no_failure(invoke: Invoke, asked: Asked) -> None:
    asked[0].append(Check("hub", "odd", "fix it"))
    done = invoke("doctor")
    assert (done.code, done.stderr) == (0, "")
    assert "→ fix it" in done.stdout
    assert done.stdout.endswith("1 ok, 1 warning, 0 failed\n")
    assert asked[1][0]["model"] is None
    assert asked[1][0]["online"] is False


@pytest.mark.parametrize("style", ["table", "json"])
def test_the_first_failure_decides(invoke: Invoke, asked: Asked, style: str) -> None:
    asked[0].extend([Check("hub", "gone", "come back", NetworkError), Check("model", "no", "yes", ModelError)])
    done = invoke("doctor", "--format", style, "--model", "org/m", "--online", "--gpu-memory", "1GiB")
    assert (done.code, done.stderr) == (8, "")
    assert asked[1] == [{"model": "org/m", "cpu_memory": None, "gpu_memory": "1GiB", "online": True}]
    if style == "json":
        record = json.loads(done.stdout)
        validate(record, "doctor")
        assert (record["status"], record["exit_code"]) == ("fail", 8)
        assert [check["name"] for check in record["checks"]] == ["torch", "hub", "model"]
    else:
        assert "come back" in done.stdout


@pytest.mark.parametrize("option", ["--cpu-memory", "--gpu-memory"])
def test_a_size_that_is_none(invoke: Invoke, asked: Asked, option: str) -> None:
    done = invoke("doctor", option, "much")
    assert (done.code, done.stdout) == (2, "")
    assert f"{option}: 'much' is not a size" in done.stderr


def test_colours_only_on_terminals(invoke: Invoke, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in invoke("doctor").stdout


@pytest.fixture
def broken_torch(tmp_path: Path, hermetic: dict[str, str]) -> dict[str, str]:
    """Settings under which `import torch` fails at once in any process."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "torch.py").write_text("raise ImportError('libc10.so: undefined symbol')\n")
    return {"PYTHONPATH": f"{tmp_path / 'broken'}:{hermetic['PYTHONPATH']}"}


def test_a_broken_torch_is_a_finding(run_switchrun: RunSwitchrun, broken_torch: dict[str, str]) -> None:
    done = run_switchrun(["doctor", "--format", "json"], env={**broken_torch, "HF_TOKEN": SECRET})
    record = json.loads(done.stdout)
    validate(record, "doctor")
    assert (done.returncode, done.stderr, record["exit_code"]) == (1, "", 1)
    checks = {check["name"]: check for check in record["checks"]}
    assert checks["torch"]["finding"] == "torch does not work: ImportError: libc10.so: undefined symbol"
    assert "pip install" in checks["torch"]["hint"]
    assert checks["model"]["status"] == "ok"
    assert "no token" not in checks["hub"]["finding"]
    assert SECRET not in done.stdout


def test_no_torch_in_this_process(hermetic: dict[str, str], broken_torch: dict[str, str]) -> None:
    script = (
        "import sys; from switchrun.cli.app import run; run(['doctor', '--offload-folder', 'tier']);"
        "print(sorted({'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=hermetic | broken_torch, capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"
    assert "libc10.so" in done.stdout


def test_ctrl_c(tmp_path: Path, hermetic: dict[str, str]) -> None:
    """The process that hangs in torch is gone too, and nothing is left in the offload folder."""
    (tmp_path / "slow").mkdir()
    note = tmp_path / "pid"
    (tmp_path / "slow" / "torch.py").write_text(
        f"import os, time\nopen({str(note) + '.new'!r}, 'w').write(str(os.getpid()))\n"
        f"os.rename({str(note) + '.new'!r}, {str(note)!r})\ntime.sleep(600)\n"
    )
    env = hermetic | {"PYTHONPATH": f"{tmp_path / 'slow'}:{hermetic['PYTHONPATH']}"}
    command = [sys.executable, "-m", "switchrun", "doctor", "--offload-folder", str(tmp_path / "tier")]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not note.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 130
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    assert [path.name for path in (tmp_path / "tier").glob("*")] in ([], ["index"])


@pytest.mark.slow
def test_a_real_run(run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["doctor", "--format", "json"], timeout=150)
    record = json.loads(done.stdout)
    validate(record, "doctor")
    checks = {check["name"]: check for check in record["checks"]}
    assert checks["torch"]["status"] == checks["bitsandbytes"]["status"] == "ok"
    assert done.returncode == record["exit_code"]
