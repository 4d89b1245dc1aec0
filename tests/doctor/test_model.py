"""The model: opens, fits, is not there, is damaged; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from switchrun.checkpoint import hub
from switchrun.checkpoint.remote import HubRanges
from switchrun.doctor.check import Check
from switchrun.doctor.machine_checks import check_model, open_model
from switchrun.planning import Budgets
from switchrun.units import GIB, MIB
from tests.checkpoint.test_locate import put_into_cache
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config


def check(model: str | None, tmp_path: Path, cpu_bytes: int = 4 * GIB) -> Check:
    return check_model(open_model(model, tmp_path / "offload"), Budgets(cpu_bytes))


def test_the_demo_model(tmp_path: Path) -> None:
    found = check(None, tmp_path)
    assert (found.status, found.hint, found.exit_code) == ("ok", None, 0)
    assert found.finding.startswith("demo, 14.2 MiB in BF16, 32 experts of 264 KiB; 4 GiB on cpu hold 32")


def test_a_model_that_does_not_fit(tmp_path: Path) -> None:
    found = check(None, tmp_path, 100 * MIB)
    assert (found.status, found.exit_code) == ("fail", 6)
    assert "needs at least" in found.finding
    assert "--cpu-memory" in (found.hint or "")


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
    assert (found.status, found.exit_code) == ("fail", code)
    assert finding in found.finding
    assert found.hint


def test_a_damaged_model(tmp_path: Path) -> None:
    folder = save_checkpoint(random_model(tiny_config()), tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    found = check(str(folder), tmp_path)
    assert (found.status, found.exit_code) == ("fail", 7)
    assert "truncated" in found.finding


def test_a_hub_model_is_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not(*_: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(HubRanges, "list_files", must_not)
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo, revision: None)
    found = check("org/tiny@main", tmp_path)
    assert (found.status, found.exit_code) == ("warn", 0)
    assert found.finding == "org/tiny is not in the Hub's local cache"
    assert "hf download org/tiny" in (found.hint or "")


def test_a_hub_model_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = put_into_cache(save_checkpoint(random_model(tiny_config()), tmp_path / "m"))
    monkeypatch.setattr(hub, "cached_snapshot", lambda repo, revision: snapshot)
    found = check("org/tiny", tmp_path)
    assert found.status == "ok"
    assert found.finding.startswith("org/tiny, ")


def test_a_bug_is_no_finding(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        check_model(ZeroDivisionError(), Budgets(GIB))
