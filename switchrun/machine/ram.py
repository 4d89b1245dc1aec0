"""Memory: what this machine and its container still give, and what this process takes. No torch."""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

import psutil

from switchrun.machine.files import system_lines

_CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes() -> int:
    """Return the memory that this process may still take: the machine's, or its container's if that is less."""
    available = _machine_bytes("available", "SC_AVPHYS_PAGES")
    room = [limit - used for limit, used in memory_limits()]
    return max(0, min([available, *room]))


def total_memory_bytes() -> int:
    """Return the memory of this machine."""
    return _machine_bytes("total", "SC_PHYS_PAGES")


def _machine_bytes(field: str, pages: str) -> int:
    try:
        return int(getattr(psutil.virtual_memory(), field))
    except OSError:  # without /proc; this says less of what the page cache would give
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def memory_limits() -> list[tuple[int, int]]:
    """Return (limit, use) in bytes of every memory cgroup that holds this process, v2 and v1, up to the root."""
    found = []
    for line in system_lines(Path("/proc/self/cgroup")):
        _, colon, rest = line.partition(":")
        controllers, second, group = rest.partition(":")
        if not colon or not second:
            continue
        if controllers == "":
            root, limit_name, use_name, cache_name = _CGROUP, "memory.max", "memory.current", b"inactive_file"
        elif "memory" in controllers.split(","):
            root, limit_name = _CGROUP / "memory", "memory.limit_in_bytes"
            use_name, cache_name = "memory.usage_in_bytes", b"total_inactive_file"
        else:
            continue
        folder = root / group.lstrip("/")
        # In a container the group's path may be the host's: then only the root is there.
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            try:
                limit = (place / limit_name).read_bytes().strip()
                if limit == b"max":
                    continue
                statistics = dict(row.split() for row in (place / "memory.stat").read_bytes().splitlines())
                # The page cache counts as used, but the kernel gives it up before it kills anybody.
                used = int((place / use_name).read_bytes()) - int(statistics.get(cache_name, 0))
                found.append((int(limit), used))
            except (OSError, ValueError):
                continue
    return found


def peak_rss_bytes() -> int:
    """Return the largest resident set that this process had so far (VmHWM), in bytes."""
    for line in system_lines(Path("/proc/self/status")):
        match line.split():
            case ["VmHWM:", size, "kB"] if size.isdecimal():
                return int(size) * 1024
    return rss_bytes()


def rss_bytes() -> int:
    """Return the resident set of this process now, in bytes."""
    try:
        return int(psutil.Process().memory_info().rss)
    except psutil.Error:  # without /proc; this is the peak
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def give_back_freed() -> None:
    """Have malloc give back to the system what is free, also between what is in use; does nothing outside of glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
