"""The child that tries torch: real, broken, junk, hanging, crashing; and what is made of its answers."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from switchrun import hardware
from switchrun.doctor import torch_child
from switchrun.doctor.check import Status
from switchrun.doctor.torch_probe import NOT_TRIED, STAGES, TorchProbe, build_of, check_bitsandbytes, check_torch
from tests.doctor.conftest import cuda_torch, torch_answer


def ask(script: str, timeout: float = 60) -> Any:
    with TorchProbe([sys.executable, "-c", script], timeout) as probe:
        return probe.answer()


def write(stages: dict[str, Any]) -> str:
    """A script that answers as the child does."""
    lines = "\n".join(json.dumps({name: found}) for name, found in stages.items())
    return f"print({lines!r}, flush=True)\n"


def test_a_good_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_bf16_instructions", lambda: True)
    assert ask(write(torch_answer())) == torch_answer()
    check = check_torch(torch_answer())
    assert (check.status, check.exit_code) == (Status.OK, 0)
    assert check.finding == "2.13.0+cpu, CPU build, 2 threads, bf16 instructions"
    assert check_bitsandbytes(torch_answer()).status is Status.OK


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("raise SystemExit('libcudart.so.13: cannot open shared object file')", "libcudart.so.13: cannot open"),
        ("raise SystemExit(3)", "ended with 3 and gave no answer"),
        ("print('junk'); print('[1]'); print('{')", "ended with 0 and gave no answer"),
        ("import os; os.kill(os.getpid(), 11)", "ended by SIGSEGV"),
    ],
)
def test_a_child_that_gives_no_answer(script: str, words: str) -> None:
    answer = ask(script)
    assert set(answer) == set(STAGES)
    assert words in answer["driver"]["error"]
    check = check_torch(answer)
    assert (check.status, check.exit_code) == (Status.FAIL, 1)
    assert check.mend


def test_a_crash_tells_where() -> None:
    half = {name: torch_answer()[name] for name in ("driver", "torch")}
    answer = ask(write(half) + "import os; os.kill(os.getpid(), 6)")
    assert answer["torch"]["version"] == "2.13.0+cpu"
    assert "SIGABRT" in answer["libraries"]["error"]
    assert answer["bitsandbytes"]["error"] == answer["devices"]["error"] == NOT_TRIED
    check = check_torch(answer)
    assert check.status is Status.FAIL
    assert "transformers" in check.finding
    assert "SIGABRT" in check.finding
    assert check_bitsandbytes(answer).status is Status.WARN


def test_a_child_that_hangs_is_killed_with_all_that_it_started(tmp_path: Path) -> None:
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
    assert (check.status, check.exit_code) == (Status.FAIL, 1)
    assert "more than 3 s" in check.finding
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(pid, 9)
    pytest.fail("the grandchild still runs")


def test_leaving_ends_the_child() -> None:
    probe = TorchProbe([sys.executable, "-c", "import time; time.sleep(600)"])
    with pytest.raises(KeyboardInterrupt), probe:
        raise KeyboardInterrupt
    assert probe._child.returncode == -9


def test_torch_that_cannot_be_imported(tmp_path: Path, hermetic: dict[str, str]) -> None:
    """The real child, with a torch that raises and prints."""
    (tmp_path / "torch.py").write_text("print('on stdout')\nraise ImportError('libgomp.so.1: not found\\nmore')\n")
    command = [sys.executable, "-P", torch_child.__file__]
    env = hermetic | {"PYTHONPATH": str(tmp_path)}
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
    assert check_torch(answer).status is Status.OK
    assert check_bitsandbytes(answer).status is Status.OK
    assert answer["torch"]["threads"] == 1
    assert "error" not in answer["devices"]


def test_libraries_that_are_broken() -> None:
    check = check_torch(torch_answer(libraries={"error": "ImportError: no"}))
    assert (check.status, check.exit_code) == (Status.FAIL, 1)
    assert "transformers" in (check.mend or "")
    check = check_bitsandbytes(torch_answer(bitsandbytes={"error": "RuntimeError: no"}))
    assert (check.status, check.exit_code) == (Status.WARN, 0)
    assert "bitsandbytes" in (check.mend or "")


@pytest.mark.parametrize(("there", "words"), [(True, ", bf16 instr"), (False, "no bf16 instr")])
def test_bf16_is_what_the_processor_says(monkeypatch: pytest.MonkeyPatch, there: bool, words: str) -> None:
    monkeypatch.setattr(hardware, "has_bf16_instructions", lambda: there)
    assert words in check_torch(torch_answer()).finding
    assert check_torch(torch_answer()).details["bf16_instructions"] is there


def test_builds() -> None:
    assert build_of(cuda_torch()) == "CUDA 12.8"
    none = dict.fromkeys(("cuda", "hip", "xpu"))
    assert build_of(none | {"hip": "6.3"}) == "ROCm 6.3"
    assert build_of(none | {"xpu": "20250302"}) == "XPU"
    assert build_of(none) == "CPU"


def test_bf16_is_asked_of_each_gpu() -> None:
    asked: list[int] = []

    @contextlib.contextmanager
    def device(number: int) -> Iterator[None]:
        asked.append(number)
        yield

    gpus = SimpleNamespace(device=device, is_bf16_supported=lambda including_emulation: including_emulation)
    assert torch_child._gpu_bf16(gpus, 1) is False
    assert torch_child._gpu_bf16(SimpleNamespace(device=device), 2) is None
    assert torch_child._gpu_bf16(SimpleNamespace(device=device, is_bf16_supported=lambda: True), 3) is None
    assert asked == [1, 2, 3]


def test_copying_is_timed_and_what_cannot_be_page_locked_is_told() -> None:
    """On the CPU as the device: torch refuses to page-lock without a GPU, and the rate is ordinary memory's."""
    import torch

    waits = []
    found = torch_child.copy_rate(torch, "cpu", 1 << 20, lambda: waits.append(None))
    assert found["host_to_device_bytes_per_second"] > 0
    assert len(waits) == 2 * torch_child._COPIES
    assert ("page_lock_error" in found) != torch.accelerator.is_available()
