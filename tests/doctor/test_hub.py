"""The Hub's settings; a server of our own where it is asked. Its settings are read at import: so, in a child."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.test_locate import Hub

SCRIPT = """
import json, sys
from switchrun.doctor.machine_checks import check_hub
model, online = json.loads(sys.argv[1])
check = check_hub(model and tuple(model), online)
print(json.dumps({name: getattr(check, name) for name in ("status", "finding", "hint", "exit_code")}))
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
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Hub that has org/tiny; gives the settings that lead to it."""
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "config.json").write_text("{}")
    handler = type("OneHub", (Hub,), {"root": tmp_path / "repo", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()
    thread.join()


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


def test_the_hub_answers(hub: dict[str, str]) -> None:
    found = check(("org/tiny", None), online=True, **hub)
    assert found["status"] == "ok"
    assert found["finding"].endswith("; it knows org/tiny")


def test_it_is_not_asked_without_online(hub: dict[str, str]) -> None:
    assert check(("org/none", None), **hub)["status"] == "ok"


@pytest.mark.parametrize(
    ("model", "code", "finding"),
    [
        (("org/tiny", "v9"), 5, "org/tiny has no revision 'v9' on the Hub"),
        (("org/gated", None), 5, "org/gated is gated on the Hub"),
        (("org/broken", None), 8, "the Hub could not be reached: "),
        (None, 5, "no model of that name on the Hub"),
    ],
)
def test_the_hub_refuses(hub: dict[str, str], model: tuple[str, str | None] | None, code: int, finding: str) -> None:
    found = check(model, online=True, **hub)
    assert (found["status"], found["exit_code"]) == ("fail", code)
    assert finding in found["finding"]


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
