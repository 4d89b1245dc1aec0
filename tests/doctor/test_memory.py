"""Memory: enough, little, too little, and in a container."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest

from switchrun.doctor.machine_checks import check_memory
from switchrun.machine import ram
from switchrun.units import GIB, MIB


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 GiB, 20 of them free, no limits."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=24 * GIB, available=20 * GIB))
    monkeypatch.setattr(ram, "memory_limits", lambda: [(1 << 62, 0)])


def test_enough() -> None:
    check = check_memory()
    assert (check.status, check.finding, check.hint) == ("ok", "20 GiB available of 24 GiB", None)
    assert check.details == {
        "total_bytes": 24 * GIB,
        "available_bytes": 20 * GIB,
        "container_limit_bytes": None,
    }


@pytest.mark.parametrize(
    ("limit", "used", "status", "code"),
    [
        (8 * GIB, GIB, "ok", 0),
        (2 * GIB, 512 * MIB, "warn", 0),
        (500 * MIB, 0, "fail", 6),
    ],
)
def test_a_container(monkeypatch: pytest.MonkeyPatch, limit: int, used: int, status: str, code: int) -> None:
    monkeypatch.setattr(ram, "memory_limits", lambda: [(limit, used), (30 * GIB, 2 * GIB)])
    check = check_memory()
    assert (check.status, check.exit_code) == (status, code)
    assert "that the container may take" in check.finding
    assert check.details["container_limit_bytes"] == limit
    assert check.details["available_bytes"] == limit - used
    assert (check.hint is None) == (status == "ok")
    assert status == "ok" or "container's limit" in (check.hint or "")


def test_other_programs_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=24 * GIB, available=GIB // 2))
    check = check_memory()
    assert (check.status, check.exit_code) == ("fail", 6)
    assert (check.hint or "").startswith("end other programs")
