"""Models by Hub id, with the command and no network: `tests/checkpoint/test_locate.py` has the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.checkpoint.test_locate import COMMIT, put_into_cache
from tests.conftest import RunSwitchrun, validate
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.fake_hub import FakeHub


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    folder = save_checkpoint(random_model(tiny_config()), tmp_path / "m")
    save_tiny_tokenizer(folder)
    return put_into_cache(folder)


@pytest.mark.parametrize("model", ["org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"])
def test_plan_from_the_cache(model: str, snapshot: Path, run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["plan", "--model", model, "--format", "json"])
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(done.stdout)
    assert (record["model_id"], record["revision"], record["path"]) == ("org/tiny", COMMIT, str(snapshot))


def test_fill_from_the_cache(snapshot: Path, run_switchrun: RunSwitchrun) -> None:
    args = ["fill", "the <extra_id_0> sat", "--format", "json", "--max-new-tokens", "2"]
    done = run_switchrun(args, env={"SWITCHRUN_MODEL": "org/tiny"})
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["model"] == {"id": "org/tiny", "revision": COMMIT, "dtype": "fp32"}


@pytest.mark.parametrize("model", ["org/other", "org/tiny@v9", "org/tiny@" + "f" * 40])
def test_what_is_not_in_the_cache(model: str, snapshot: Path, run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["plan", "--model", model])
    assert (done.returncode, done.stdout) == (8, "")
    assert done.stderr.startswith(f"switchrun: {model.partition('@')[0]} is not in the local cache")
    assert "HF_HUB_OFFLINE" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_snapshot_that_lacks_its_weights(snapshot: Path, run_switchrun: RunSwitchrun) -> None:
    (snapshot / "model.safetensors").unlink()
    done = run_switchrun(["plan", "--model", "org/tiny"])
    assert (done.returncode, done.stdout) == (8, "")
    assert "org/tiny is not in the local cache, and HF_HUB_OFFLINE is set" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.one_in(3)
@pytest.mark.parametrize("source", ["org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"])
def test_a_tokenizer_from_the_cache(source: str, snapshot: Path, tmp_path: Path, run_switchrun: RunSwitchrun) -> None:
    model = save_checkpoint(random_model(tiny_config()), tmp_path / "without")
    args = ["fill", "the <extra_id_0> sat", "--model", str(model), "--max-new-tokens", "2", "--format", "json"]
    done = run_switchrun([*args, "--tokenizer", source])
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["output_ids"]


@pytest.mark.parametrize(
    ("source", "code", "message"),
    [
        ("org/other", 8, "org/other is not in the local cache, and HF_HUB_OFFLINE is set"),
        ("/nope", 5, "there is no folder '/nope', and it is not a Hub id"),
    ],
)
def test_a_tokenizer_that_is_not_there(source: str, code: int, message: str, run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(["fill", "the <extra_id_0> sat", "--tokenizer", source])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert message in done.stderr


@pytest.mark.parametrize("way", ["ranges", "download"])
def test_a_missing_tokenizer_is_reported_before_weights_are_fetched(
    way: str, tmp_path: Path, run_switchrun: RunSwitchrun
) -> None:
    folder = save_checkpoint(random_model(tiny_config()), tmp_path / "m")
    with FakeHub() as hub:
        hub.add("org/tiny", folder)
        done = run_switchrun(
            ["fill", "the <extra_id_0> sat", "--model", "org/tiny", "--hub", way], env=hub.environment()
        )
        assert hub.sent("cdn") == 0
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (5, "", 1)
    assert "has no tokenizer (tokenizer.json or spiece.model) (use --tokenizer PATH|ID" in done.stderr


def test_plan_and_fill_by_range(tmp_path: Path, run_switchrun: RunSwitchrun) -> None:
    folder = save_checkpoint(random_model(tiny_config(d_model=64, d_ff=128, num_experts=6)), tmp_path / "m")
    save_tiny_tokenizer(folder)
    local = run_switchrun(["fill", "the <extra_id_0> sat", "--model", str(folder), "--max-new-tokens", "4"])
    with FakeHub() as hub:
        hub.add("org/tiny", folder)
        env = hub.environment() | {"SWITCHRUN_MODEL": "org/tiny", "SWITCHRUN_OFFLOAD_FOLDER": "kept"}
        # Small enough to be downloaded, which plan only counts.
        record = json.loads(run_switchrun(["plan", "--format", "json"], env=env).stdout)
        assert record["hub"]["downloads"]
        assert hub.sent("cdn") < record["total_bytes"] / 2
        env["SWITCHRUN_HUB"] = "ranges"
        record = json.loads(run_switchrun(["plan", "--format", "json"], env=env).stdout)
        validate(record, "plan")
        cost = record["hub"]
        assert (cost["downloads"], cost["index_bytes"], cost["kept_share"]) == (False, 0, 0)
        fill = ["fill", "the <extra_id_0> sat", "--max-new-tokens", "4", "--stats"]
        done = run_switchrun(fill, env=env)
        assert (done.returncode, done.stdout) == (0, local.stdout)
        assert "of them from the Hub" in done.stderr
        assert json.loads(run_switchrun(["plan", "--format", "json"], env=env).stdout)["hub"]["kept_share"] > 0
        sent = hub.sent("cdn")
        done = run_switchrun(fill, env=env)
        assert (done.stdout, hub.sent("cdn")) == (local.stdout, sent)
        assert "of them from the Hub" not in done.stderr
