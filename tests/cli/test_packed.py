"""`--dtype int8` and `nf4` on the command line: answers, warnings and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import RunSwitchrun, validate
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.int8 import save_in_int8

TEXT = "A man <extra_id_0> into a bar."


@pytest.mark.slow
def test_a_fill_a_damaged_expert_and_a_folder_of_something_else(run_switchrun: RunSwitchrun, tmp_path: Path) -> None:
    tier = tmp_path / "tier"
    command = ["fill", "--dtype", "int8", "--offload-folder", str(tier), TEXT]
    first = run_switchrun([*command, "--format", "json"])
    assert (first.returncode, first.stderr) == (0, "")
    record = json.loads(first.stdout)
    validate(record, "fill")
    assert record["model"]["dtype"] == "int8"

    damaged = sorted(tier.rglob("*.safetensors"))[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    second = run_switchrun(command)
    assert (second.returncode, second.stdout) == (0, record["text"] + "\n")
    (warning,) = second.stderr.splitlines()
    assert warning.startswith(f"switchrun: warning: {damaged} is damaged: ")
    assert damaged.read_bytes() == whole

    (manifest,) = tier.rglob("manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"fingerprint": "another"}))
    third = run_switchrun(command)
    assert (third.returncode, third.stdout) == (7, "")
    assert "the checkpoint has changed since these experts were made of it" in third.stderr
    assert "switchrun offload clear" in third.stderr
    planned = run_switchrun(["plan", "--dtype", "int8", "--offload-folder", str(tier)])
    assert (planned.returncode, planned.stdout, planned.stderr) == (7, "", third.stderr)


@pytest.mark.slow
def test_the_limit_leaves_no_room(run_switchrun: RunSwitchrun, tmp_path: Path) -> None:
    command = ["fill", "--dtype", "nf4", "--offload-folder", str(tmp_path / "tier"), "--offload-limit", "1KiB", TEXT]
    done = run_switchrun(command)
    assert done.returncode == 0
    (warning,) = done.stderr.splitlines()
    assert "the limit leaves no room; no more experts are stored there" in warning
    quiet = run_switchrun([*command, "--quiet"])
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, done.stdout, "")
    assert not list((tmp_path / "tier").rglob("*.safetensors"))


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_a_plan(run_switchrun: RunSwitchrun, dtype: str) -> None:
    done = run_switchrun(["plan", "--dtype", dtype, "--format", "json"])
    assert done.returncode == 0
    record = json.loads(done.stdout)
    validate(record, "plan")
    assert (record["dtype"], record["compute_dtype"]) == (dtype, "bf16")
    shown = run_switchrun(["plan", "--dtype", dtype])
    assert f"{dtype} (computed in bf16, stored as BF16)" in shown.stdout


@pytest.mark.slow
def test_a_model_in_8_bit(run_switchrun: RunSwitchrun, tmp_path: Path) -> None:
    model = save_tiny_tokenizer(save_in_int8(save_checkpoint(random_model(tiny_config()), tmp_path / "model")))
    tier = tmp_path / "tier"
    at = ["--model", str(model), "--offload-folder", str(tier)]
    filled = [run_switchrun(["fill", *at, *dtype, "the <extra_id_0> sat"]) for dtype in ([], ["--dtype", "int8"])]
    assert [done.returncode for done in filled] == [0, 0]
    assert filled[0].stdout == filled[1].stdout
    assert not list(tier.rglob("*.safetensors"))
    assert "int8 (computed in fp32, stored as I8)" in run_switchrun(["plan", *at]).stdout
    validate(json.loads(run_switchrun(["plan", *at, "--format", "json"]).stdout), "plan")
    refused = {
        (
            "fill",
            "--dtype",
            "bf16",
            "the <extra_id_0> sat",
        ): "so it cannot be had in bf16: what was rounded off is lost",
        ("plan", "--dtype", "nf4"): "so it cannot be had in nf4",
        ("prepare", "--dtype", "int8"): "so there is nothing to prepare",
    }
    for command, message in refused.items():
        done = run_switchrun([*command, *at])
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert "stored in int8, " + message in line
