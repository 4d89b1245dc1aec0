"""The model: opens, fits, is not there, is damaged; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from switchrun.checkpoint import hub
from switchrun.doctor.check import Check, Status
from switchrun.doctor.model import check_model, open_model
from switchrun.planning import Budgets
from switchrun.units import GIB, MIB
from tests.checkpoint.test_locate import COMMIT, put_into_cache
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config


def check(model: str | None, tmp_path: Path, cpu_bytes: int = 4 * GIB) -> Check:
    return check_model(model, open_model(model, tmp_path / "offload"), Budgets(cpu_bytes))


def test_the_demo_model(tmp_path: Path) -> None:
    found = check(None, tmp_path)
    assert (found.status, found.mend, found.exit_code) == (Status.OK, None, 0)
    assert found.finding.startswith("demo, 14.2 MiB in BF16, 32 experts of 264 KiB; 4 GiB on cpu hold 32")
    assert found.details["repairs"] == []
    assert found.details["expert_slots"] == {"cpu": 32}
    assert found.details["minimum_cpu_bytes"] < GIB


def test_a_model_that_does_not_fit(tmp_path: Path) -> None:
    found = check(None, tmp_path, 100 * MIB)
    assert (found.status, found.exit_code) == (Status.FAIL, 6)
    assert "needs at least" in found.finding
    assert "--cpu-memory" in (found.mend or "")
    assert found.details["num_experts"] == 32
    assert "expert_slots" not in found.details


def test_repairs_are_counted(tmp_path: Path) -> None:
    folder = save_checkpoint(
        random_model(tiny_config(tie_word_embeddings=False, num_sparse_encoder_layers=2, num_sparse_decoder_layers=2)),
        tmp_path / "m",
        dialect="hub-switch-c",
    )
    found = check(str(folder), tmp_path)
    assert found.status is Status.OK
    assert len(found.details["repairs"]) > 0
    assert f"{len(found.details['repairs'])} repairs (see: switchrun plan --model {folder})" in found.finding


@pytest.mark.parametrize(
    ("model", "code", "finding"),
    [
        ("/no/such/folder", 5, "there is no folder '/no/such/folder'"),
        (".", 5, "config.json"),
        (".@main", 2, "has no revisions"),
        ("config.json", 5, "is a file"),
    ],
)
def test_what_is_not_there(tmp_path: Path, model: str, code: int, finding: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    if model == ".":
        (tmp_path / "config.json").unlink()
    found = check(model, tmp_path)
    assert (found.status, found.exit_code) == (Status.FAIL, code)
    assert finding in found.finding
    assert found.mend
    assert found.details == {"model_id": model}


def test_a_damaged_model(tmp_path: Path) -> None:
    folder = save_checkpoint(random_model(tiny_config()), tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    found = check(str(folder), tmp_path)
    assert (found.status, found.exit_code) == (Status.FAIL, 7)
    assert "truncated" in found.finding


def test_a_hub_model_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not(*_: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(hub, "find_snapshot", must_not)
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo, revision: None)
    found = check("org/tiny@main", tmp_path)
    assert (found.status, found.exit_code) == (Status.WARN, 0)
    assert found.finding == "org/tiny@main is not in the Hub's local cache"
    assert "hf download org/tiny" in (found.mend or "")


def test_a_hub_model_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = put_into_cache(save_checkpoint(random_model(tiny_config()), tmp_path / "m"))
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo, revision: snapshot)
    found = check("org/tiny", tmp_path)
    assert found.status is Status.OK
    assert (found.details["model_id"], found.details["revision"]) == ("org/tiny", COMMIT)


def test_a_bug_is_no_finding(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        check_model(None, ZeroDivisionError(), Budgets(GIB))
