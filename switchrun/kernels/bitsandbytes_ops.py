"""bitsandbytes' own operations, for GPUs, imported when they are first needed: that takes a second and 45 MiB."""

from __future__ import annotations

import logging
import sys
from functools import cache
from typing import Any

import torch


@cache
def operations() -> Any:
    """Return `torch.ops.bitsandbytes`.

    While it is imported, bitsandbytes 0.50 looks for the package `kernels` and has it download native code from the
    Hub, or else logs that it is missing. Nothing here calls that code, so the package is hidden and the log is off.
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
    return torch.ops.bitsandbytes
