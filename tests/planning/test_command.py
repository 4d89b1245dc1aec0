"""`switchrun plan` as a command: JSON by its schema, maps from files, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunSwitchrun, validate

MAIN = """
import json, sys
from switchrun.cli.app import run
code = run(sys.argv[1:])
heavy = {"torch", "transformers", "accelerate", "numpy", "safetensors", "huggingface_hub"}
print(json.dumps([code, sorted(heavy & set(sys.modules))]), file=sys.stderr)
"""


@pytest.mark.parametrize("style", ["json", "table"])
def test_no_torch(style: str) -> None:
    command = [sys.executable, "-c", MAIN, "plan", "--cpu-memory", "2GiB", "--format", style]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stderr) == [0, []]
    assert done.stdout


def plan(run_switchrun: RunSwitchrun, *args: str) -> dict[str, Any]:
    done = run_switchrun(["plan", "--format", "json", *args])
    assert (done.returncode, done.stderr) == (0, "")
    record: dict[str, Any] = json.loads(done.stdout)
    validate(record, "plan")
    return record


def test_the_json_is_valid_and_is_a_device_map(run_switchrun: RunSwitchrun, tmp_path: Path) -> None:
    first = plan(run_switchrun, "--cpu-memory", "2GiB", "--dtype", "fp32", "--num-beams", "2", "--input-tokens", "7")
    assert (first["dtype"], first["num_beams"], first["estimate"]["input_tokens"]) == ("fp32", 2, 7)
    (tmp_path / "plan.json").write_text(json.dumps(first))
    (tmp_path / "deep.json").write_text('{"": "cpu", "encoder.block.1.layer.0": "disk"}')
    again = plan(run_switchrun, "--cpu-memory", "2GiB", "--dtype", "fp32", "--device-map", str(tmp_path / "plan.json"))
    assert again["device_map"] == first["device_map"]
    deep = plan(run_switchrun, "--cpu-memory", "2GiB", "--device-map", str(tmp_path / "deep.json"))
    on_disk = {placed["module"] for placed in deep["placements"] if placed["tier"] == "disk"}
    assert on_disk
    assert all(module.startswith("encoder.block.1.layer.0.") for module in on_disk)


def test_what_a_batch_size_of_auto_reserves(run_switchrun: RunSwitchrun) -> None:
    one, auto = (plan(run_switchrun, "--cpu-memory", "1GiB", "--batch-size", size) for size in ("1", "auto"))
    assert (one["batch_size"], auto["batch_size"]) == (1, "auto")
    assert auto["minimum_cpu_bytes"] == one["minimum_cpu_bytes"]
    assert auto["tiers"][0]["activation_bytes"] > one["tiers"][0]["activation_bytes"]
    done = run_switchrun(["plan", "--cpu-memory", "1GiB", "--batch-size", "auto"])
    assert "First fill of one input:" in done.stdout


def test_a_gpu_in_the_json(run_switchrun: RunSwitchrun) -> None:
    record = plan(run_switchrun, "--cpu-memory", "2GiB", "--gpu-memory", "1GiB")
    assert set(record["device_map"].values()) == {0}
    assert [use["tier"] for use in record["tiers"]] == ["gpu:0", "cpu", "disk"]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ('{"": "cuda"}', 2, "the device map puts '' on 'cuda'"),
        ('{"": "cpu", "encoder.block.99": "disk"}', 2, "names 'encoder.block.99', which this model does not have"),
        ('{"encoder": "cpu"}', 2, "the device map has no entry for 'shared.weight'"),
        ("nonsense", 2, "is not JSON"),
        (None, 2, "there is no file"),
    ],
)
def test_maps_that_cannot_be_used(
    run_switchrun: RunSwitchrun, tmp_path: Path, text: str | None, code: int, message: str
) -> None:
    path = tmp_path / "map.json"
    if text is not None:
        path.write_text(text)
    done = run_switchrun(["plan", "--device-map", str(path)])
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_minimum_that_the_error_names_works(run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["plan", "--cpu-memory", "1MiB"])
    assert (done.returncode, done.stdout) == (6, "")
    least = done.stderr.split("use --cpu-memory ")[1].split(" ")[0]
    record = plan(run_switchrun, "--cpu-memory", least)
    assert record["tiers"][-2]["expert_slots"] >= 1
    less = f"{int(least.removesuffix('MiB')) - 1}MiB"
    assert run_switchrun(["plan", "--cpu-memory", less]).returncode == 6
