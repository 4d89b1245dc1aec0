"""The command as it is installed: help, version, imports, and every exit code that needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import switchrun
from tests.conftest import RunSwitchrun, validate

HEAVY = ("torch", "transformers", "accelerate", "numpy", "huggingface_hub", "rich")


def _imported(code: str, env: dict[str, str]) -> set[str]:
    script = f"import sys\nsys.argv = ['switchrun', *{code!r}.split()]\nfrom switchrun.cli.app import main\n"
    script += "try:\n    main()\nexcept SystemExit:\n    pass\n"
    script += f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1].replace("'", '"')))


@pytest.mark.parametrize(
    "args",
    [
        "",
        "--version",
        "fill --help",
        "plan --help",
        "eval --help",
        "prepare --help",
        "offload --help",
        "doctor --help",
        "models --help",
        "config path",
        "config show --format json",
        "fill nosentinel",
    ],
)
def test_light_commands_import_nothing_heavy(hermetic: dict[str, str], args: str) -> None:
    assert _imported(args, hermetic) == set()


def test_plan_imports_no_torch(hermetic: dict[str, str]) -> None:
    assert _imported("plan", hermetic) <= {"rich"}
    assert _imported("plan --format json", hermetic) == set()


def test_what_stores_are_there_is_told_without_torch(hermetic: dict[str, str]) -> None:
    assert _imported("offload ls --format json", hermetic) == set()
    assert _imported("offload verify", hermetic) <= {"rich"}
    assert _imported("offload clear --yes", hermetic) == set()
    assert _imported("prepare --dtype int8 --limit 0 --dry-run", hermetic) <= {"rich"}


def test_models_are_listed_without_torch(hermetic: dict[str, str]) -> None:
    assert _imported("models --format json", hermetic) <= {"huggingface_hub"}
    assert _imported("models", hermetic) <= {"rich", "huggingface_hub"}


def test_importing_the_package_imports_nothing_heavy(hermetic: dict[str, str]) -> None:
    script = f"import sys, switchrun; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], env=hermetic, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_help(run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["--help"])
    assert (done.returncode, done.stderr) == (0, "")
    assert run_switchrun([]).stdout == done.stdout
    assert "fill" in done.stdout


def test_version(run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["--version"])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"switchrun {switchrun.__version__}\n", "")


def test_the_console_script_is_the_same(run_switchrun: RunSwitchrun, hermetic: dict[str, str]) -> None:
    script = Path(sys.executable).with_name("switchrun")
    if not script.exists():
        pytest.skip("switchrun is not installed")
    done = subprocess.run([script, "--help"], env=hermetic, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, run_switchrun(["--help"]).stdout)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["fill", "--nonsense"], 2, "there is no option --nonsense"),
        (["fill", "--batch-size", "0", "x"], 2, "--batch-size: '0' is neither auto nor a whole number above 0"),
        (["fill", "--seed", "1", "<extra_id_0>"], 2, "--seed does nothing without --sample"),
        (["fill", "-", "x"], 2, "stdin"),
        (["fill", "A walks"], 4, "no sentinel"),
        (["fill", "<extra_id_1>"], 4, "<extra_id_0>"),
        (["fill", "<extra_id_0> <extra_id_0>"], 4, "twice"),
        (["fill", ""], 4, "no sentinel"),
        (["plan", "--model", "/no/such/folder"], 5, "/no/such/folder"),
        (["plan", "--model", "."], 5, "config.json"),
        (["plan", "--cpu-memory", "1MiB"], 6, "needs at least"),
        (["plan", "--cpu-memory", "much"], 2, "--cpu-memory: 'much' is not a size"),
        (["plan", "--disk-bandwidth", "fast"], 2, "--disk-bandwidth: 'fast' is not a rate"),
        (["plan", "--disk-bandwidth", "0GB/s"], 2, "--disk-bandwidth: '0GB/s' is not a rate"),
        (["plan", "--dtype", "int4"], 2, "int4"),
        (["fill", "--offload-limit", "little", "<extra_id_0>"], 2, "--offload-limit: 'little' is not a size"),
        (["plan", "--offload-folder", ""], 2, "--offload-folder: the name is empty"),
        (["offload", "clear", "--yes", "--offload-folder", ""], 2, "--offload-folder: the name is empty"),
        (["offload", "clear", "--yes", "--model", ""], 2, "--model: the name is empty"),
        (["plan", "--model", ""], 2, "--model: the name is empty"),
        (["prepare", "--dtype", "int8", "--model", ""], 2, "--model: the name is empty"),
        (["bench", "--model", ""], 2, "--model: the name is empty"),
        (["doctor", "--model", ""], 2, "--model: the name is empty"),
        (["plan", "--device-map", "nowhere"], 2, "write one with: switchrun plan --format json > nowhere)"),
        (
            ["fill", "--device-map", "a b", "-m", "m", "--dtype", "int8", "--offload-folder", "my tier", "x"],
            2,
            "switchrun plan --format json --model m --dtype int8 --offload-folder 'my tier' > 'a b')",
        ),
    ],
)
def test_errors_are_one_line_and_stdout_stays_empty(
    run_switchrun: RunSwitchrun, args: list[str], code: int, message: str
) -> None:
    done = run_switchrun(args)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("switchrun: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_several_bad_texts_hold_their_places(run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["fill", "a", "b", "--format", "jsonl"])
    assert done.returncode == 4
    for line in done.stdout.splitlines():
        validate(json.loads(line), "fill")
    assert "switchrun: text 1: " in done.stderr
    assert "switchrun: text 2: " in done.stderr


def test_plan_is_a_table_without_colours_on_a_pipe(run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["plan"], env={"FORCE_COLOR": "1"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if not line.startswith("folder")) <= 80


def test_plan_json_is_valid_and_a_device_map(run_switchrun: RunSwitchrun, tmp_path: Path) -> None:
    done = run_switchrun(["plan", "--format", "json", "--disk-bandwidth", "1.8GB/s", "--batch-size", "2"])
    record = json.loads(done.stdout)
    validate(record, "plan")
    assert record["estimate"]["bandwidth_bytes_per_second"] == 1.8e9
    assert record["batch_size"] == 2
    file = tmp_path / "plan.json"
    file.write_text(done.stdout)
    again = run_switchrun(["plan", "--format", "json", "--device-map", str(file)])
    validate(json.loads(again.stdout), "plan")
    assert json.loads(again.stdout)["device_map"] == record["device_map"]


def test_the_minimum_that_plan_states_works(run_switchrun: RunSwitchrun) -> None:
    minimum = json.loads(run_switchrun(["plan", "--format", "json"]).stdout)["minimum_cpu_bytes"]
    assert run_switchrun(["plan", "--cpu-memory", str(minimum)]).returncode == 0
    assert run_switchrun(["plan", "--cpu-memory", str(minimum - 1)]).returncode == 6
