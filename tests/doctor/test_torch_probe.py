"""The child that tries torch: real, broken, junk, hanging, crashing; and what is made of its answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from switchrun.doctor import torch_child
from switchrun.doctor.torch_checks import NOT_TRIED, STAGES, TorchProbe, check_bitsandbytes, check_kernels, check_torch
from switchrun.errors import BudgetError
from switchrun.kernels import libraries
from switchrun.machine import processor
from tests.conftest import ROOT
from tests.doctor.conftest import kernels, torch_answer

Ask = Callable[..., Any]


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], TorchProbe]:
    """A function that starts a script in the place of the child."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(script: str) -> TorchProbe:
        (tmp_path / "in_its_place.py").write_text(script)
        return TorchProbe("in_its_place")

    return start


@pytest.fixture
def ask(child: Callable[[str], TorchProbe]) -> Ask:
    """A function that starts a script and returns what is made of its answers."""

    def call(script: str, timeout: float = 60) -> Any:
        with child(script) as probe:
            return probe.answer(timeout)

    return call


def write(stages: dict[str, Any]) -> str:
    """A script that answers as the child does."""
    lines = "\n".join(json.dumps({name: found}) for name, found in stages.items())
    return f"print({lines!r}, flush=True)\n"


def test_a_good_answer(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has_bf16_instructions", lambda: True)
    assert ask(write(torch_answer())) == torch_answer()
    check = check_torch(torch_answer())
    assert (check.status, check.exit_code) == ("ok", 0)
    assert check.finding == "2.13.0+cpu, CPU build, 2 threads, bf16 instructions"
    assert check_bitsandbytes(torch_answer()).status == "ok"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("raise SystemExit('libcudart.so.13: cannot open shared object file')", "libcudart.so.13: cannot open"),
        ("raise SystemExit(3)", "ended with 3 and gave no answer"),
        ("print('junk'); print('[1]'); print('{')", "ended with 0 and gave no answer"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
    ],
)
def test_a_child_that_gives_no_answer(ask: Ask, script: str, words: str) -> None:
    answer = ask(script)
    assert set(answer) == set(STAGES)
    assert words in answer["driver"]["error"]
    check = check_torch(answer)
    assert (check.status, check.exit_code) == ("fail", 1)
    assert check.hint


def test_a_crash_tells_where(ask: Ask) -> None:
    half = {name: torch_answer()[name] for name in ("driver", "torch")}
    answer = ask(write(half) + "import os; os.kill(os.getpid(), 6)")
    assert answer["torch"]["version"] == "2.13.0+cpu"
    assert "SIGABRT" in answer["libraries"]["error"]
    assert {answer[stage]["error"] for stage in ("bitsandbytes", "devices", "kernels")} == {NOT_TRIED}
    check = check_torch(answer)
    assert check.status == "fail"
    assert "transformers" in check.finding
    assert "SIGABRT" in check.finding
    assert check_bitsandbytes(answer).status == "warn"


def test_a_child_that_hangs_is_killed_with_all_that_it_started(ask: Ask, tmp_path: Path) -> None:
    script = write({"driver": {"version": None, "gpus": []}}) + (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    start = time.monotonic()
    answer = ask(script, timeout=3)
    assert time.monotonic() - start < 60
    assert answer["driver"] == {"version": None, "gpus": []}
    assert answer["torch"]["error"] == "it took more than 3 s"
    check = check_torch(answer)
    assert (check.status, check.exit_code) == ("fail", 1)
    assert "more than 3 s" in check.finding
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    pytest.fail("the grandchild still runs")


def test_leaving_ends_the_child(child: Callable[[str], TorchProbe]) -> None:
    probe = child("import time; time.sleep(600)")
    with pytest.raises(KeyboardInterrupt), probe:
        raise KeyboardInterrupt
    assert probe._child.returncode == -9


def test_torch_that_cannot_be_imported(ask: Ask, tmp_path: Path, hermetic: dict[str, str]) -> None:
    """The real child, with a torch that raises and prints."""
    (tmp_path / "torch.py").write_text("print('on stdout')\nraise ImportError('libgomp.so.1: not found\\nmore')\n")
    command = [sys.executable, "-m", torch_child.__name__]
    env = hermetic | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[1:] == [{"torch": {"error": "ImportError: libgomp.so.1: not found"}}]
    assert done.stderr == "on stdout\n"
    answer = ask(f"print({done.stdout!r})")
    assert check_torch(answer).finding == "torch does not work: ImportError: libgomp.so.1: not found"
    assert check_bitsandbytes(answer).finding == "not tried, since torch does not work"


@pytest.mark.slow
def test_the_real_child() -> None:
    with TorchProbe() as probe:
        answer = probe.answer()
    assert check_torch(answer).status == "ok"
    assert check_bitsandbytes(answer).status == "ok"
    assert answer["torch"]["threads"] == 1
    assert "error" not in answer["devices"]
    if libraries.paths():
        assert check_kernels(answer).status == "ok"
        assert tuple(answer["kernels"]["paths"]) == libraries.paths()


def test_libraries_that_are_broken() -> None:
    check = check_torch(torch_answer(libraries={"error": "ImportError: no"}))
    assert (check.status, check.exit_code) == ("fail", 1)
    assert "transformers" in (check.hint or "")
    check = check_bitsandbytes(torch_answer(bitsandbytes={"error": "RuntimeError: no"}))
    assert (check.status, check.exit_code) == ("warn", 0)
    assert "bitsandbytes" in (check.hint or "")


@pytest.mark.parametrize(("there", "words"), [(True, ", bf16 instr"), (False, "no bf16 instr")])
def test_bf16_is_what_the_processor_says(monkeypatch: pytest.MonkeyPatch, there: bool, words: str) -> None:
    monkeypatch.setattr(processor, "has_bf16_instructions", lambda: there)
    assert words in check_torch(torch_answer()).finding


def test_builds() -> None:
    assert torch_child.build_of(SimpleNamespace(cuda="12.8", hip=None, xpu=None)) == "CUDA 12.8"
    assert torch_child.build_of(SimpleNamespace(cuda=None, hip="6.3", xpu=None)) == "ROCm 6.3"
    assert torch_child.build_of(SimpleNamespace(cuda=None, hip=None, xpu="20250302")) == "XPU 20250302"
    assert torch_child.build_of(SimpleNamespace(cuda=None, hip=None)) == "CPU"


def test_a_process_that_torch_does_not_fit_into(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise BudgetError("ulimit -v allows little", "lift it")

    monkeypatch.setattr("switchrun.doctor.torch_checks.check_limits", refuse)
    check = check_torch(torch_answer(torch={"error": "MemoryError"}))
    assert (check.finding, check.hint, check.exit_code) == ("ulimit -v allows little", "lift it", 6)


MMX = {"refused": "SWITCHRUN_KERNELS is 'mmx', which this machine does not have", "hint": "set it to off"}


@pytest.mark.parametrize(
    ("found", "status", "code", "finding", "hint"),
    [
        (kernels("portable", "avx2"), "ok", 0, "avx2 is used; portable, avx2 multiply right", None),
        (kernels("portable", "avx2", used="portable", named="portable"), "ok", 0, "by SWITCHRUN_KERNELS", None),
        (kernels(), "warn", 0, "they are not built: everything works", "pip install --force-reinstall --no-deps "),
        (kernels(unusable=True), "warn", 0, "for another version or system", "install a C compiler"),
        (kernels("portable") | {"used": None, "named": "off"}, "warn", 0, "is off", "unset SWITCHRUN_KERNELS"),
        (kernels("portable", **MMX), "fail", 2, "'mmx'", "set it to off"),
        (kernels("portable", "avx2", wrong={"avx2": "it is off"}), "fail", 1, "avx2: it is off", "=portable, and"),
        (kernels("portable", wrong={"portable": "it is off"}), "fail", 1, "portable: it is off", "=off to do without"),
        (
            kernels("portable", "avx2", used="portable", wrong={"avx2": "it is off"}),
            "warn",
            0,
            "; avx2: it is",
            "report",
        ),
        (
            {"error": "the process was ended by SIGILL"},
            "fail",
            1,
            "they do not work: the process",
            "=off to do without",
        ),
        ({"error": NOT_TRIED}, "warn", 0, "not tried", "fix that first"),
    ],
)
def test_kernels(found: dict[str, Any], status: str, code: int, finding: str, hint: str | None) -> None:
    check = check_kernels(torch_answer(kernels=found))
    assert (check.status, check.exit_code) == (status, code)
    assert finding in check.finding
    assert check.hint is None if hint is None else hint in str(check.hint)


@pytest.mark.skipif(not libraries.paths(), reason="built without kernels")
def test_a_path_that_multiplies_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switchrun.kernels.native.linear_int8", lambda x, codes, scb: x @ codes.float().T)
    monkeypatch.setenv("SWITCHRUN_KERNELS", "portable")
    found = torch_child._kernels()
    assert set(found["wrong"]) == set(libraries.paths())
    assert "int8" in found["wrong"]["portable"]
    assert (found["used"], os.environ["SWITCHRUN_KERNELS"]) == ("portable", "portable")
