"""The Hub's settings, and a fake Hub where it is asked. Its settings are read at import: so, in a child."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_hub import FakeHub, Fault

SCRIPT = """
import json, sys
from switchrun.doctor.hub_check import check_hub
model, online = json.loads(sys.argv[1])
check = check_hub(model and tuple(model), online)
names = ("status", "finding", "hint", "exit_code", "details")
print(json.dumps({name: getattr(check, name) for name in names}))
print(sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
"""
SECRET = "hf_doNotShowThisToAnybody"


def check(model: tuple[str, str | None] | None = None, *, online: bool = False, **env: str) -> dict[str, Any]:
    command = [sys.executable, "-c", SCRIPT, json.dumps([model, online])]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, timeout=60)
    assert done.stderr == "[]\n"
    assert SECRET not in done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub that has org/tiny, with 300 KB of weights."""
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model-00001.safetensors").write_bytes(bytes(100))
    (folder / "model-00002.safetensors").write_bytes(bytes(300_000))
    (folder / "optimizer.bin").write_bytes(bytes(500_000))
    with FakeHub() as hub:
        hub.add("org/tiny", folder)
        hub.add("org/gated", folder, access="gated")
        yield hub


def test_settings_as_they_are(tmp_path: Path) -> None:
    found = check()
    assert (found["status"], found["hint"], found["exit_code"]) == ("ok", None, 0)
    cache = tmp_path / "home" / "huggingface" / "hub"
    assert found["finding"].startswith(f"cache {cache}, ")
    assert found["finding"].endswith(" free, no token, offline (HF_HUB_OFFLINE)")
    assert not cache.exists()


def test_secrets_are_not_told() -> None:
    found = check(HF_TOKEN=SECRET, HTTPS_PROXY=f"http://me:{SECRET}@proxy:3128", HF_HUB_OFFLINE="0")
    assert "token" not in found["finding"]
    assert "proxy from HTTPS_PROXY" in found["finding"]


def test_a_cache_that_cannot_be_written() -> None:
    found = check(HF_HOME="/proc/self")
    assert (found["status"], found["exit_code"]) == ("warn", 0)
    assert "cannot be written" in found["finding"]
    assert "HF_HOME" in found["hint"]


def test_a_model_is_timed_and_the_rate_limit_is_shown(hub: FakeHub, tmp_path: Path) -> None:
    hub.quota = (3000, 300.0)
    found = check(("org/tiny", None), **hub.environment())
    assert found["status"] == "ok"
    about = r"; it knows org/tiny, [0-9.]+ [MG]B/s on one connection \(293 KiB of model-00002.safetensors\), "
    assert re.search(about + "2998 requests left for 5 min 00 s$", found["finding"]), found["finding"]
    assert found["details"]["read_bytes_per_second"] > 0
    assert (found["details"]["requests_left"], found["details"]["requests_reset_seconds"]) == (2998, 300)
    assert hub.sent("cdn") == 300_001
    assert not (tmp_path / "home" / "huggingface").exists()


def test_a_hub_without_a_rate_limit(hub: FakeHub) -> None:
    found = check(("org/tiny", None), online=True, **hub.environment())
    assert found["finding"].endswith("KiB of model-00002.safetensors)")
    assert found["details"]["requests_left"] is None


def test_the_hub_is_asked_for_a_model_that_is_named_or_online(hub: FakeHub) -> None:
    assert check(**hub.environment())["status"] == "ok"
    assert not hub.requests()
    found = check(("org/none", None), **hub.environment())
    assert (found["status"], found["exit_code"]) == ("warn", 0)
    assert "no model of that name on the Hub" in found["finding"]
    asked = len(hub.requests())
    assert check(("org/tiny", None), HF_ENDPOINT=hub.endpoint)["status"] == "ok"  # offline
    assert len(hub.requests()) == asked


@pytest.mark.parametrize(
    ("model", "code", "finding"),
    [
        (("org/tiny", "v9"), 5, "org/tiny has no revision 'v9' on the Hub"),
        (("org/gated", None), 5, "org/gated is gated on the Hub"),
        (None, 5, "no model of that name on the Hub"),
    ],
)
def test_the_hub_refuses(hub: FakeHub, model: tuple[str, str | None] | None, code: int, finding: str) -> None:
    found = check(model, online=True, **hub.environment())
    assert (found["status"], found["exit_code"]) == ("fail", code)
    assert finding in found["finding"]


def test_a_hub_that_breaks(hub: FakeHub) -> None:
    hub.fail(Fault(status=500), origin="hub", times=None)
    found = check(("org/tiny", None), online=True, **hub.environment())
    assert (found["status"], found["exit_code"]) == ("fail", 8)
    assert "the Hub could not be reached: " in found["finding"]
    hub.heal()
    hub.fail(Fault(status=503), times=None)
    found = check(("org/tiny", None), online=True, **hub.environment())
    assert (found["status"], found["exit_code"]) == ("fail", 8)
    assert "the Hub could not be reached: 503" in found["finding"]


def test_no_connection() -> None:
    found = check(online=True, HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    assert (found["status"], found["exit_code"]) == ("fail", 8)
    assert found["finding"].startswith("the Hub could not be reached: ")
    assert "connection" in found["hint"]


def test_online_and_offline() -> None:
    found = check(online=True)
    assert (found["status"], found["exit_code"], found["hint"]) == ("fail", 8, "unset HF_HUB_OFFLINE")


def test_without_a_home_there_is_no_cache(tmp_path: Path) -> None:
    found = check(HF_HOME="~no-such-user/huggingface")
    assert (found["status"], found["exit_code"]) == ("warn", 0)
    assert "no home folder" in found["finding"]
    assert "HF_HOME" in found["hint"]


def test_a_token_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "token").mkdir()  # as good as one in a folder of another user, for a test that root runs
    found = check(HF_TOKEN_PATH=str(tmp_path / "token"))
    assert found["status"] == "ok"
    assert "no token" in found["finding"]
