"""`fill` on the demo model, in a process of its own: the real session behind the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import switchrun
from tests.conftest import RunSwitchrun, validate

DEMO = Path(switchrun.__file__).parent / "demo"
SHORT = ("--max-new-tokens", "4")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Give a copy of the demo model whose weights are cut off."""
    folder = tmp_path / "damaged"
    shutil.copytree(DEMO, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


def test_lines_become_valid_records(run_switchrun: RunSwitchrun) -> None:
    long = "word " * 3000 + "<extra_id_0>"
    lines = f"The <extra_id_0> sat on the mat.\nno sentinel\nA ___ and a ___.\n{long}\n"
    args = ["fill", "--format", "jsonl", "--batch-size", "2", "--blank", "___", "--stats", *SHORT]
    done = run_switchrun(args, input=lines)
    assert done.returncode == 3, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    for record in records:
        validate(record, "fill")
    assert [record["id"] for record in records] == [0, 1, 2, 3]
    assert records[2]["input"] == "A <extra_id_0> and a <extra_id_1>."
    assert [span["sentinel"] for span in records[2]["spans"]] == ["<extra_id_0>", "<extra_id_1>"]
    assert 1 <= records[0]["tokens"]["output"] <= 4
    assert done.stderr.startswith("switchrun: line 2: the text has no sentinel")
    assert records[3]["tokens"]["input"] > 3000, "the model takes any length, if there is memory for it"
    assert "Memory of each tier" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.slow
def test_generate_on_a_model_that_is_pre_trained_only(run_switchrun: RunSwitchrun) -> None:
    args = ["generate", "--format", "jsonl", "--prefix", "a b ", "--num-beams", "2", *SHORT]
    done = run_switchrun(args, input="The man sat on the mat.\n\n")
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    for record in records:
        validate(record, "generate")
    assert [record["input"] for record in records] == ["The man sat on the mat.", ""]
    assert "<extra_id" in records[0]["raw"]
    assert "<extra_id" not in records[0]["text"]
    assert done.stderr.count("answers in sentinels") == 1


def test_raw_with_the_plan_as_device_map(run_switchrun: RunSwitchrun, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(run_switchrun(["plan", "--format", "json"]).stdout)
    sampling = ["--sample", "--temperature", "0.7", "--top-p", "0.9", "--top-k", "20", "--seed", "1"]
    args = ["fill", "The <extra_id_0> sat.", "--format", "raw", "--device-map", str(plan), *sampling, *SHORT]
    done = run_switchrun(args)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("<pad>")
    assert done.stdout.count("\n") == 1


def test_a_fill_does_without_torchs_compiler(run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["fill", "The <extra_id_0> sat.", *SHORT], env={"PYTHONPROFILEIMPORTTIME": "1"})
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "transformers.masking_utils" in imported
    assert not imported & {"torch._dynamo", "torch.distributed.tensor", "torch._inductor", "sympy"}


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--model", "/no/such/folder"], 5, "/no/such/folder"),
        (["--cpu-memory", "1MiB"], 6, "needs at least"),
    ],
)
def test_models_that_do_not_open(run_switchrun: RunSwitchrun, args: list[str], code: int, message: str) -> None:
    done = run_switchrun(["fill", "A <extra_id_0>.", *args])
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_damaged_model(run_switchrun: RunSwitchrun, damaged: Path) -> None:
    for command in (["fill", "A <extra_id_0>."], ["plan"]):
        done = run_switchrun([*command, "--model", str(damaged)])
        assert (done.returncode, done.stdout) == (7, "")
        assert "model.safetensors" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_model_that_is_not_in_the_local_cache(run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["plan", "--model", "google/switch-base-8"])
    assert (done.returncode, done.stdout) == (8, "")
    assert "google/switch-base-8" in done.stderr
    assert done.stderr.count("\n") == 1
