"""Where torch cannot be imported, that is said before it is tried."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from switchrun.errors import BudgetError
from switchrun.machine.limits import check_limits
from switchrun.units import GIB, MIB
from tests.conftest import RunSwitchrun


@pytest.fixture(autouse=True)
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def limit(monkeypatch: pytest.MonkeyPatch, which: int, size: int) -> None:
    real = resource.getrlimit
    monkeypatch.setattr(resource, "getrlimit", lambda what: (size, -1) if what == which else real(what))


@pytest.mark.parametrize(("which", "flag"), [(resource.RLIMIT_AS, "-v"), (resource.RLIMIT_DATA, "-d")])
def test_a_limit_below_what_the_libraries_take(monkeypatch: pytest.MonkeyPatch, which: int, flag: str) -> None:
    limit(monkeypatch, which, 200 * MIB)
    with pytest.raises(BudgetError, match=f"ulimit {flag} allows the process 200 MiB") as caught:
        check_limits()
    assert f"ulimit {flag} unlimited" in caught.value.hint
    limit(monkeypatch, which, 64 * GIB)
    check_limits()
    limit(monkeypatch, which, 200 * MIB)
    monkeypatch.setitem(sys.modules, "torch", sys)
    check_limits()


@pytest.mark.parametrize("args", [["fill", "A <extra_id_0> b"], ["prepare", "--dtype", "int8"]])
@pytest.mark.parametrize("mebibytes", [100, 400, 700, 950])
def test_commands_under_a_limit(hermetic: dict[str, str], args: list[str], mebibytes: int) -> None:
    size = mebibytes * MIB
    done = subprocess.run(
        [sys.executable, "-m", "switchrun", *args],
        env=hermetic,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
    )
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr.startswith("switchrun: ulimit -v allows the process ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ["fill", "A <extra_id_0> b"],
        ["prepare", "--dtype", "int8"],
        ["eval", "--text", "-", "--dtype", "bf16", "-q"],
    ],
)
def test_without_docstrings(run_switchrun: RunSwitchrun, args: list[str]) -> None:
    done = run_switchrun(args, env={"PYTHONOPTIMIZE": "2"}, input="The river was warm after the rain, and so was I.\n")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "switchrun: transformers cannot do without docstrings, which -OO leaves out (unset PYTHONOPTIMIZE)\n"
    )
