"""What the processor can do, and how long this process has run. No torch."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

from switchrun.machine.files import system_lines

_CPUINFO = Path("/proc/cpuinfo")
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


@cache
def has_bf16_instructions() -> bool:
    """Whether this processor multiplies bfloat16 itself; False where the system doesn't say.

    torch's own answer (`mkldnn._is_mkldnn_bf16_supported`) is no use: it is true wherever there is AVX-512, since
    oneDNN can emulate the product, at the price of float32.
    """
    flags = (line.partition(":") for line in system_lines(_CPUINFO))
    # `flags` on x86, `Features` on arm64; every core has the same.
    return any(name.strip() in {"flags", "Features"} and _BF16_FLAGS & set(words.split()) for name, _, words in flags)


def process_age_seconds() -> float:
    """Return the time since this process was started, to a hundredth of a second; 0 where the system doesn't say."""
    # After the command's name, which may hold spaces and line breaks, `starttime` is field 22 of 52: the 20th.
    fields = "\n".join(system_lines(Path("/proc/self/stat"))).rpartition(")")[2].split()
    if len(fields) < 20 or not fields[19].isdecimal():
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
