"""What the processor can do, and how long this process has run. No torch."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path


@cache
def has_avx512_bf16() -> bool:
    """Tell whether this processor has AVX-512's products of bfloat16; no where the system does not tell."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False


def process_age_seconds() -> float:
    """Return the time since this process was started, to a hundredth of a second."""
    # After the command's name, which may hold spaces, `starttime` is field 22 of 52: the 20th.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
