"""Versions: as needed, missing, outside."""

from __future__ import annotations

import importlib.metadata
import tomllib

import pytest

from switchrun.doctor import machine_checks
from tests.conftest import ROOT

GOOD = {
    "accelerate": "1.15.0", "bitsandbytes": "0.50.2", "huggingface-hub": "2.4.0", "nvidia-ml-py": "13.580.82",
    "packaging": "26.4", "protobuf": "7.36.2", "psutil": "7.2.2", "rich": "15.0.0",
    "safetensors": "0.8.0", "sentencepiece": "0.2.3", "torch": "2.13.0+cpu", "transformers": "5.24.0",
    "typer": "0.29.2", "xxhash": "4.1.0",
}  # fmt: skip


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What is installed, and what the packages need of others; for a test to change."""
    versions: dict[str, str] = dict(GOOD)
    requires: dict[str, list[str]] = {}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires.get(name))
    return versions, requires


Installed = tuple[dict[str, str], dict[str, list[str]]]


def test_as_needed(installed: Installed) -> None:
    check = machine_checks.check_packages()
    assert (check.status, check.hint, check.exit_code) == ("ok", None, 0)
    assert "torch 2.13.0+cpu" in check.finding


def test_a_clone_says_itself_what_it_needs() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert machine_checks.needed_requirements() == tomllib.load(file)["project"]["dependencies"]


@pytest.mark.parametrize("version", [None, "2.6.0", "2.14.0"])
def test_torch_is_missing_or_outside(installed: Installed, version: str | None) -> None:
    versions, _ = installed
    del versions["torch"]
    if version:
        versions["torch"] = version
    check = machine_checks.check_packages()
    assert (check.status, check.exit_code) == ("fail", 1)
    assert f"torch {version or 'is not'}" in check.finding
    assert check.hint is not None
    assert check.hint.startswith("pip install 'torch")
    assert "<2.14" in check.hint


def test_a_pre_release_counts_by_its_number(installed: Installed) -> None:
    installed[0]["torch"] = "2.13.1.dev20261101+cpu"
    assert machine_checks.check_packages().status == "ok"


@pytest.mark.parametrize("version", ["4.36.2", "4.45.2", "4.57.3", "5.0.0", "5.20.9"])
def test_versions_of_transformers_that_get_switch_wrong_are_not_allowed(installed: Installed, version: str) -> None:
    installed[0]["transformers"] = version
    check = machine_checks.check_packages()
    assert check.status == "fail"
    assert "transformers<6,>=5.21" in (check.hint or "")


def test_requirements_of_an_installation(monkeypatch: pytest.MonkeyPatch, installed: Installed) -> None:
    monkeypatch.setattr(machine_checks, "__file__", "/nowhere/site-packages/switchrun/doctor/machine_checks.py")
    assert machine_checks.needed_requirements() == []
    installed[1]["switchrun"] = ["torch>=2.7", "pytest; extra == 'test'"]
    assert machine_checks.needed_requirements() == installed[1]["switchrun"]
    assert machine_checks.check_packages().finding == "torch 2.13.0+cpu, and 1 packages in all, as needed"
