"""Limits of the process: those that keep torch out, and errors that come of one.

The first are looked at before torch is imported, which may end a process that is refused memory.
"""

from __future__ import annotations

import errno
import os
import resource
import sys

from switchrun.errors import BudgetError, UsageError
from switchrun.units import MIB, format_bytes

#: What the demo's fill takes on a CPU at least, and each core more: addresses and private memory (torch 2.13).
_ADDRESSES, _PRIVATE, _THREAD = 1050 * MIB, 336 * MIB, 8 * MIB

#: How the system says that it gives no more memory or open files, and how libraries do.
_REFUSED = {errno.ENOMEM, errno.EMFILE, errno.ENFILE}
_WORDS = (
    "an't allocate memory",
    "annot allocate memory",
    "failed to map segment",
    "bad_alloc",
    "can't start new thread",
    "Too many open files",
)


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


def refused_by_system(error: BaseException) -> BudgetError | None:
    """Return what to say of an error that comes of memory, threads or files which the system refused; else None.

    torch's own errors are known by their names: it is not to be imported for the question.
    """
    if isinstance(error, BudgetError):
        return None
    first: BaseException | None = None
    cause: BaseException | None = error
    while cause is not None:
        if (
            isinstance(cause, MemoryError)
            or type(cause).__name__ == "OutOfMemoryError"
            or (isinstance(cause, OSError) and cause.errno in _REFUSED)
            or (isinstance(cause, (RuntimeError, ImportError)) and any(words in str(cause) for words in _WORDS))
        ):
            first = cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    if first is None:
        return None
    if "Too many open files" in str(first):
        return BudgetError(str(first), "allow more with: ulimit -n 1024")
    hint = "allow less with --cpu-memory or --gpu-memory, or lift the limits that ulimit -a shows"
    return BudgetError(f"out of memory: {str(first) or 'the system gave no more'}", hint)
