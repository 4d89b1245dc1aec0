"""The names of the public API, and what importing them costs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import switchrun
import switchrun.planning

HEAVY = ("torch", "transformers", "accelerate", "numpy")


def run_python(code: str) -> object:
    """Run a program in a fresh interpreter and give the JSON that it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_exactly_these_names_are_public() -> None:
    assert switchrun.__all__ == [
        "Client",
        "FillResult",
        "Filling",
        "GenerateResult",
        "GenerationOptions",
        "Progress",
        "ScoreResult",
        "Session",
        "__version__",
        "plan",
    ]


@pytest.mark.parametrize("name", switchrun.__all__)
def test_each_name_resolves(name: str) -> None:
    value = getattr(switchrun, name)
    assert getattr(value, "__name__", name) == name


def test_other_names_do_not() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Sesion'"):
        _ = switchrun.Sesion  # type: ignore[attr-defined]


def test_importing_switchrun_and_planning_imports_nothing_heavy() -> None:
    code = (
        "import json, sys; from switchrun import plan; plan(cpu_memory='64GiB');"
        f"print(json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))"
    )
    assert run_python(code) == []


def test_records_and_sessions_need_no_torch_before_one_is_opened() -> None:
    code = (
        "import json, sys; from switchrun import FillResult, GenerationOptions, Session;"
        "before = 'torch' in sys.modules; Session.open(cpu_memory='64GiB').close();"
        "print(json.dumps([before, 'torch' in sys.modules]))"
    )
    assert run_python(code) == [False, True]


def test_dir_lists_the_public_names() -> None:
    assert run_python("import json, switchrun; print(json.dumps(dir(switchrun)))") == sorted(switchrun.__all__)


def test_plan_stays_a_function() -> None:
    """A module of the same name would take its place in the package once it is imported."""
    from switchrun import plan

    code = (
        "import json, switchrun, switchrun.planning, switchrun.planning.planner, switchrun.cli.app;"
        "session = switchrun.Session.open(cpu_memory='64GiB'); session.close();"
        "from switchrun import plan;"
        "print(json.dumps([callable(plan), callable(switchrun.plan), plan(cpu_memory='64GiB').model_id]))"
    )
    assert callable(plan)
    assert run_python(code) == [True, True, "demo"]
