"""The whole of it: the order, the exit code, the record by its schema, and what happens when a check itself fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import switchrun.doctor
from switchrun.doctor import Check, machine_checks, torch_checks
from switchrun.doctor.torch_checks import STAGES
from switchrun.errors import BudgetError, ModelError
from switchrun.output.sinks import checks_record
from switchrun.output.tables import render_checks
from tests.conftest import ROOT, validate
from tests.doctor.conftest import GIB, cuda_torch, device, driver, torch_answer

NAMES = "packages,torch,kernels,bitsandbytes,gpu,memory,offload folder,checkpoint,hub,model".split(",")

Answer = Callable[..., None]


@pytest.fixture(autouse=True)
def answer(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """A function that says what the probe answers; all is well until it is called."""

    def set_answer(**changes: Any) -> None:
        found = torch_answer(**changes)

        class Probe:
            def __enter__(self) -> Probe:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def answer(self) -> Any:
                return found

        monkeypatch.setattr(torch_checks, "TorchProbe", Probe)

    monkeypatch.setattr(machine_checks, "check_packages", lambda: Check("packages", "fine"))
    set_answer()
    return set_answer


def examine(offload_folder: str = "tier", model: str | None = None, **options: Any) -> list[Check]:
    options = {"cpu_memory": None, "gpu_memory": None, "online": False} | options
    return switchrun.doctor.examine(Path(offload_folder), model, **options)


def record(checks: list[Check]) -> dict[str, Any]:
    found = checks_record(checks)
    validate(json.loads(json.dumps(found, allow_nan=False)), "doctor")
    return found


def test_all_is_well() -> None:
    checks = examine()
    assert [check.name for check in checks] == NAMES
    assert "fail" not in {check.status for check in checks}
    found = record(checks)
    assert found["exit_code"] == 0
    assert all((check["hint"] is None) == (check["status"] == "ok") for check in found["checks"])


def test_a_machine_with_gpus(answer: Answer) -> None:
    answer(driver=driver(GIB), torch=cuda_torch(), devices={"found": [device()]})
    checks = examine(gpu_memory="0=6GiB")
    assert {check.name: check.status for check in checks}["gpu"] == "warn"
    record(checks)


def test_all_is_wrong(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(torch={"error": "no"}, **{stage: {"error": "not tried"} for stage in STAGES[2:]})
    checks = examine("/proc/self/tier", "/no/model", cpu_memory="1MiB", gpu_memory="1GiB")
    assert [check.name for check in checks] == [name for name in NAMES if name != "checkpoint"]
    found = record(checks)
    codes = {check["name"]: check["exit_code"] for check in found["checks"] if check["status"] == "fail"}
    assert codes == {"torch": 1, "gpu": 2, "offload folder": 9, "model": 5}
    assert (found["status"], found["exit_code"]) == ("fail", 1)
    assert all(check["hint"] for check in found["checks"] if check["status"] != "ok")


def test_budgets_are_those_of_the_options() -> None:
    model = examine(cpu_memory="1MiB")[-1]
    assert (model.name, model.status, model.exit_code) == ("model", "fail", 6)
    record([model])


def test_a_check_that_fails_itself_is_told_and_the_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Check:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(machine_checks, "check_packages", broken)
    checks = examine()
    assert [check.name for check in checks] == NAMES
    assert (checks[0].status, checks[0].exit_code) == ("fail", 1)
    assert checks[0].finding == "this check itself failed: ZeroDivisionError: oh"
    assert "in broken" in checks[0].details["traceback"]
    record(checks)


def test_a_model_that_fails_in_an_unknown_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_checks, "open_checkpoint", lambda *_, **__: 1 // 0)
    checks = examine()
    assert "ZeroDivisionError" in checks[-1].finding
    assert "checkpoint" not in [check.name for check in checks]


def test_a_driver_that_hung_is_not_asked_again(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    resolve = switchrun.doctor.resolve_budgets
    monkeypatch.setattr(switchrun.doctor, "resolve_budgets", lambda *sizes: given.append(sizes) or resolve(*sizes))
    examine()
    answer(driver={"error": "it took more than 120 s"})
    examine()
    assert given == [(None, None), (None, "0")]


def test_status_and_exit_code() -> None:
    def summary(*checks: Check) -> tuple[str, int]:
        found = checks_record(checks)
        return found["status"], found["exit_code"]

    ok, warn = Check("a", "x"), Check("b", "x", "y")
    assert summary() == ("ok", 0)
    assert summary(warn, ok) == ("warn", 0)
    assert summary(ok, Check("c", "x", "y", BudgetError), warn, Check("d", "x", "y", ModelError)) == ("fail", 6)


def test_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "a finding that needs more than one line, since it has so much to say about [what] was found here" * 2
    checks = [Check("gpu", long), Check("hub", "b", "fix it"), Check("model", "c", "other", ModelError)]
    assert f"ok      gpu    {long}\n" in render_checks(checks), "in a pipe nothing is folded"
    monkeypatch.setenv("COLUMNS", "80")
    text = render_checks(checks)
    assert max(map(len, text.splitlines())) <= 80
    assert "[what]" in text
    assert text.index("→ fix it") > text.index("hub")
    assert text.endswith("1 ok, 1 warning, 1 failed\n")
    assert "\x1b" not in text


def test_every_check_is_in_the_document() -> None:
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")][: len(NAMES)] == NAMES
