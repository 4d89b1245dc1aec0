"""Versions: as needed, missing, outside, known to be bad, and in conflict with one another."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib

import pytest

from switchrun.doctor import packages
from switchrun.doctor.check import Status
from tests.conftest import ROOT

GOOD = {
    "accelerate": "1.15.0", "bitsandbytes": "0.50.2", "huggingface-hub": "2.4.0", "nvidia-ml-py": "13.580.82",
    "packaging": "26.4", "platformdirs": "4.14.8", "protobuf": "7.36.2", "psutil": "7.2.2", "rich": "15.0.0",
    "safetensors": "0.8.0", "sentencepiece": "0.2.3", "torch": "2.13.0+cpu", "transformers": "5.24.0",
    "typer": "0.29.2", "xxhash": "4.1.0",
}  # fmt: skip


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What is installed, and what the packages need of others; for a test to change."""
    versions, requires = dict(GOOD), {"transformers": ["tokenizers<0.24; extra == 'tokenizers'"]}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires.get(name))
    return versions, requires


Installed = tuple[dict[str, str], dict[str, list[str]]]


def test_as_needed(installed: Installed) -> None:
    check = packages.check_packages()
    assert (check.status, check.mend, check.exit_code) == (Status.OK, None, 0)
    assert "torch 2.13.0+cpu" in check.finding
    assert check.details["versions"]["rich"] == "15.0.0"


def test_a_clone_says_itself_what_it_needs() -> None:
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert packages.needed_requirements() == tomllib.load(file)["project"]["dependencies"]


@pytest.mark.parametrize("version", [None, "2.6.0", "2.14.0"])
def test_torch_is_missing_or_outside(installed: Installed, version: str | None) -> None:
    versions, _ = installed
    del versions["torch"]
    if version:
        versions["torch"] = version
    check = packages.check_packages()
    assert (check.status, check.exit_code) == (Status.FAIL, 1)
    assert f"torch {version or 'is not'}" in check.finding
    assert check.mend is not None
    assert check.mend.startswith("pip install 'torch")
    assert "<2.14" in check.mend
    assert check.details["versions"]["torch"] == version


def test_a_pre_release_counts_by_its_number(installed: Installed) -> None:
    installed[0]["torch"] = "2.13.1.dev20261101+cpu"
    assert packages.check_packages().status is Status.OK


@pytest.mark.parametrize(
    ("version", "effect"),
    [
        ("4.36.2", "no sparse layer"),
        ("4.41.0", "every expert"),
        ("4.45.2", "wrong experts"),
        ("4.51.3", "dropped tokens"),
        ("5.0.0", "capacity"),
        ("5.20.9", "capacity"),
    ],
)
def test_known_bad(installed: Installed, version: str, effect: str) -> None:
    installed[0]["transformers"] = version
    check = packages.check_packages()
    assert check.status is Status.FAIL
    assert effect in check.finding
    assert "transformers<6,>=5.21" in (check.mend or "")


@pytest.mark.parametrize("version", ["4.52.0", "4.57.3", "5.21.0", "5.24.0"])
def test_not_known_to_be_bad(version: str) -> None:
    assert packages.known_bad("transformers", version) == []
    assert packages.known_bad("torch", version) == []


def test_what_is_known_to_be_bad_is_not_allowed(installed: Installed) -> None:
    for bad in ("4.36.0", "4.41.2", "4.42.0", "4.51.0", "5.0.0", "5.20.0"):
        assert packages.known_bad("transformers", bad)
        installed[0]["transformers"] = bad
        assert packages.check_packages().status is Status.FAIL


def test_a_conflict_between_packages(installed: Installed) -> None:
    versions, requires = installed
    requires["transformers"] += ["tokenizers<0.24", "regex; python_version < '3'"]
    versions["tokenizers"] = "0.24.1"
    check = packages.check_packages()
    assert (check.status, check.exit_code) == (Status.WARN, 0)
    assert check.finding == "transformers 5.24.0: tokenizers 0.24.1 is installed; needed is tokenizers<0.24"
    assert check.mend == "pip install 'tokenizers<0.24'"
    assert check.details["conflicts"] == [check.finding]


def test_requirements_of_an_installation(monkeypatch: pytest.MonkeyPatch, installed: Installed) -> None:
    monkeypatch.setattr(packages, "__file__", "/nowhere/site-packages/switchrun/doctor/packages.py")
    assert packages.needed_requirements() == []
    installed[1]["switchrun"] = ["torch>=2.7", "pytest; extra == 'test'"]
    assert packages.needed_requirements() == installed[1]["switchrun"]
    assert set(packages.check_packages().details["versions"]) == {"python", "torch"}


def test_without_packaging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    check = packages.check_packages()
    assert (check.status, check.mend) == (Status.FAIL, "pip install packaging")
