"""bitsandbytes' own operations, imported when they are first needed: that takes a second and 45 MiB."""

from __future__ import annotations

import ctypes
import logging
import sys
from functools import cache
from typing import Any

import torch

from switchrun.units import MIB

#: glibc's names for: pieces from this size on are memory of their own, and so much free memory at the end is kept.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1


@cache
def operations() -> Any:
    """Give `torch.ops.bitsandbytes`.

    While it is imported, bitsandbytes 0.50 looks for the package `kernels` and has it download native code from the
    Hub, or else logs that it is missing. Nothing here calls that code, so the package is hidden from it and the log is
    off.

    Raises:
        ImportError: bitsandbytes is not installed, or not whole; `switchrun doctor` says more.
    """
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level, kernels = log.level, sys.modules.get("kernels")
    log.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment] # importing it then fails, as if it were not there
    try:
        import bitsandbytes  # noqa: F401 - registers the operations
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if kernels is not None:
            sys.modules["kernels"] = kernels
    _keep_freed_memory()
    return torch.ops.bitsandbytes


def _keep_freed_memory() -> None:
    """Have the allocator keep what is freed: each result is new memory, and its page faults take longer than the rest.

    With the defaults of glibc 2.36, unpacking 4 MiB took up to 1,000 faults; now next to none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
        mallopt(_M_TRIM_THRESHOLD, 64 * MIB)
