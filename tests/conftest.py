"""What all tests share: an environment that has nothing of the user's, and the command as a child process."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# One thread for each test process, since many share few cores. It is read when torch is imported: so, first of all.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from hypothesis import settings
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parent.parent

RunSwitchrun = Callable[..., "subprocess.CompletedProcess[str]"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="run what takes an hour, too, and fuzz 10,000 times")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--campaign"):
        settings.register_profile("campaign", max_examples=10_000, print_blob=True)
        settings.load_profile("campaign")


@pytest.hookimpl(tryfirst=True)  # before pytest looks which are slow
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave campaigns out, CI too, unless they are asked for; of many cases of one test, most are slow."""
    seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("one_in")
        if marker is not None:
            name = item.nodeid.partition("[")[0]
            if seen[name] % marker.args[0]:
                item.add_marker("slow")
            seen[name] += 1
    if not config.getoption("--campaign"):
        left_out = [item for item in items if item.get_closest_marker("campaign")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def hermetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> dict[str, str]:
    """Give every test a home, caches and terminal settings of its own, and no network; returns its environment.

    A GPU of this machine is seen only by tests that are marked `gpu`.
    """
    for name in list(os.environ):
        if name.startswith(("SWITCHRUN_", "HF_", "TRANSFORMERS_", "XDG_")):
            monkeypatch.delenv(name)
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "PYTHONIOENCODING", "PYTHONUNBUFFERED", "LC_ALL", "LANG"):
        monkeypatch.delenv(name, raising=False)
    # An offload/ in the current folder would be taken for the offload folder.
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    home.mkdir()
    variables = {
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "SWITCHRUN_CACHE": str(home / "switchrun"),
        "OMP_NUM_THREADS": "1",
        # The tests also run where switchrun is not installed.
        "PYTHONPATH": str(ROOT),
    }
    if request.node.get_closest_marker("gpu") is None:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logging.root.manager, "disable", 0)  # a command that ran in this process has silenced libraries
    if "huggingface_hub" in sys.modules:  # which has read another environment
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return dict(os.environ)


@pytest.fixture
def run_switchrun(tmp_path: Path, hermetic: dict[str, str]) -> RunSwitchrun:
    """Give a function that runs the command in a child process, in an empty folder.

    Its keywords: `input` (text or bytes for stdin; none by default), `env` (variables to add) and `timeout`.
    """
    folder = tmp_path / "work"
    folder.mkdir()

    def run(
        args: Sequence[str],
        *,
        input: str | bytes | None = None,  # noqa: A002 - as subprocess.run calls it
        env: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        data = input.encode() if isinstance(input, str) else input
        done = subprocess.run(
            [sys.executable, "-m", "switchrun", *args],
            input=data if data is not None else b"",
            capture_output=True,
            cwd=folder,
            env={**hermetic, **(env or {})},
            timeout=timeout,
        )
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


def validate(record: Any, schema: str) -> None:
    """Check a record against `docs/schemas/<schema>.schema.json`."""
    document = json.loads((ROOT / "docs" / "schemas" / f"{schema}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(document)
    Draft202012Validator(document).validate(record)
