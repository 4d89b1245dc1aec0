"""Memory: enough, little, too little, in a container, and under ulimit -v."""

from __future__ import annotations

import resource
from types import SimpleNamespace

import psutil
import pytest

from switchrun.doctor.check import Status
from switchrun.doctor.memory import check_memory
from switchrun.machine import ram
from switchrun.units import GIB, MIB


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 GiB, 20 of them free, no swap, no limits."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=24 * GIB, available=20 * GIB))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=0, used=0))
    monkeypatch.setattr(ram, "memory_limits", lambda: [(1 << 62, 0)])
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_enough() -> None:
    check = check_memory()
    assert (check.status, check.finding, check.mend) == (Status.OK, "20 GiB available of 24 GiB", None)
    assert check.details == {
        "total_bytes": 24 * GIB,
        "available_bytes": 20 * GIB,
        "container_limit_bytes": None,
        "swap_bytes": 0,
        "swap_used_bytes": 0,
        "memlock_limit_bytes": None,
        "address_space_limit_bytes": None,
    }


def test_swap_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(total=8 * GIB, used=GIB))
    assert check_memory().finding.endswith(", 1 GiB swapped out")


@pytest.mark.parametrize(
    ("limit", "used", "status", "code"),
    [
        (8 * GIB, GIB, Status.OK, 0),
        (2 * GIB, 512 * MIB, Status.WARN, 0),
        (600 * MIB, 0, Status.FAIL, 6),
    ],
)
def test_a_container(monkeypatch: pytest.MonkeyPatch, limit: int, used: int, status: Status, code: int) -> None:
    monkeypatch.setattr(ram, "memory_limits", lambda: [(limit, used), (30 * GIB, 2 * GIB)])
    check = check_memory()
    assert (check.status, check.exit_code) == (status, code)
    assert "that the container may take" in check.finding
    assert check.details["container_limit_bytes"] == limit
    assert check.details["available_bytes"] == limit - used
    assert (check.mend is None) == (status is Status.OK)
    assert status is Status.OK or "container's limit" in (check.mend or "")


def test_other_programs_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=24 * GIB, available=GIB // 2))
    check = check_memory()
    assert (check.status, check.exit_code) == (Status.FAIL, 6)
    assert (check.mend or "").startswith("end other programs")


def test_a_limit_on_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_AS: 4 * GIB, resource.RLIMIT_MEMLOCK: 64 * 1024}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], resource.RLIM_INFINITY))
    check = check_memory()
    assert check.status is Status.WARN
    assert "ulimit -v allows 4 GiB" in check.finding
    assert check.details["memlock_limit_bytes"] == 64 * 1024
