"""How much memory is there, and who limits it?"""

from __future__ import annotations

import resource

import psutil

from switchrun.doctor.check import Check, failed, passed, warned
from switchrun.errors import BudgetError
from switchrun.machine import ram
from switchrun.planning.budgets import DEFAULT_CPU_SHARE
from switchrun.planning.memory import RUNTIME_BYTES
from switchrun.units import GIB, format_bytes

NAME = "memory"

#: With less, little more than the demo model runs.
LITTLE_BYTES = 2 * GIB


def check_memory() -> Check:
    """Tell the memory that a process may take by default, and what stands in its way."""
    total = int(psutil.virtual_memory().total)
    available = ram.available_memory_bytes()
    container = min((limit for limit, _ in ram.memory_limits() if limit < total), default=None)
    swap = psutil.swap_memory()
    address_space = _limit(resource.RLIMIT_AS)
    details = {
        "total_bytes": total,
        "available_bytes": available,
        "container_limit_bytes": container,
        "swap_bytes": int(swap.total),
        "swap_used_bytes": int(swap.used),
        "memlock_limit_bytes": _limit(resource.RLIMIT_MEMLOCK),
        "address_space_limit_bytes": address_space,
    }
    finding = f"{format_bytes(available)} available of {format_bytes(container or total)}"
    finding += " that the container may take" if container else ""
    if available * DEFAULT_CPU_SHARE < RUNTIME_BYTES:
        mend = f"end other programs; Python, torch and transformers alone take {format_bytes(RUNTIME_BYTES)}"
        if container:
            mend = f"raise the container's limit; {mend}"
        return failed(NAME, finding, mend, BudgetError, **details)
    if address_space is not None and address_space < total:
        finding += f"; ulimit -v allows {format_bytes(address_space)} of addresses, mapped files and libraries counted"
        return warned(NAME, finding, "ulimit -v unlimited; --cpu-memory is the limit to set", **details)
    if available < LITTLE_BYTES:
        where = "raise the container's limit" if container else "end other programs"
        return warned(NAME, finding, f"{where}, or expect few expert slots and many reads", **details)
    swapping = f", {format_bytes(swap.used)} swapped out" if swap.used else ""
    return passed(NAME, finding + swapping, **details)


def _limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft
