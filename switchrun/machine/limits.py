"""What keeps torch out of a process. It is looked at first: torch may end a process that is refused memory."""

from __future__ import annotations

import os
import resource
import sys

from switchrun.errors import BudgetError, UsageError
from switchrun.units import MIB, format_bytes

#: What the demo's fill takes on a CPU at least, and each core more: addresses and private memory (torch 2.13).
_ADDRESSES, _PRIVATE, _THREAD = 1050 * MIB, 336 * MIB, 8 * MIB


def check_limits() -> None:
    """Refuse a process that torch and transformers cannot be imported into, unless they were.

    Raises:
        BudgetError: `ulimit -v` or `-d` is below what they take.
        UsageError: Python runs without docstrings, which transformers reads.
    """
    if "torch" in sys.modules:
        return
    if sys.flags.optimize > 1:
        raise UsageError("transformers cannot do without docstrings, which -OO leaves out", "unset PYTHONOPTIMIZE")
    threads = len(os.sched_getaffinity(0)) * _THREAD
    for flag, what, needed in (("v", resource.RLIMIT_AS, _ADDRESSES), ("d", resource.RLIMIT_DATA, _PRIVATE)):
        limit, _ = resource.getrlimit(what)
        if limit != resource.RLIM_INFINITY and limit < needed + threads:
            raise BudgetError(
                f"ulimit -{flag} allows the process {format_bytes(limit)}, and the libraries alone take "
                f"{format_bytes(needed + threads)}",
                f"lift it with: ulimit -{flag} unlimited; what is to be limited is --cpu-memory",
            )
