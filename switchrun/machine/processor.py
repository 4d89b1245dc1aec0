"""What the processor can do, and how long this process has run. No torch."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@cache
def has_bf16_instructions() -> bool:
    """Whether this processor multiplies bfloat16 itself; False where the system doesn't say.

    torch's own answer (`mkldnn._is_mkldnn_bf16_supported`) is no use: it is true wherever there is AVX-512, since
    oneDNN can emulate the product, at the price of float32.
    """
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return False
    flags = (line.partition(":") for line in lines)
    # `flags` on x86, `Features` on arm64; every core has the same.
    return any(name.strip() in {"flags", "Features"} and _BF16_FLAGS & set(words.split()) for name, _, words in flags)


def process_age_seconds() -> float:
    """Return the time since this process was started, to a hundredth of a second."""
    # After the command's name, which may hold spaces, `starttime` is field 22 of 52: the 20th.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
