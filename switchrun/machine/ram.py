"""Memory: what this machine and its container still give, and what this process takes. No torch."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes() -> int:
    """Return the memory that this process may still take: the machine's, or its container's if that is less."""
    available = int(psutil.virtual_memory().available)
    room = [limit - used for limit, used in memory_limits()]
    return max(0, min([available, *room]))


def memory_limits() -> list[tuple[int, int]]:
    """Return (limit, use) in bytes of every memory cgroup that holds this process, v2 and v1, up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, limit_name, use_name, cache_name = _CGROUP, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit_name = _CGROUP / "memory", "memory.limit_in_bytes"
            use_name, cache_name = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        folder = root / group.lstrip("/")
        # In a container the group's path may be the host's: then only the root is there.
        for place in (folder, *folder.parents):
            if not place.is_relative_to(root):
                break
            try:
                limit = (place / limit_name).read_text().strip()
                used = int((place / use_name).read_text())
                statistics = dict(row.split() for row in (place / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            if limit != "max":
                # The page cache counts as used, but the kernel gives it up before it kills anybody.
                found.append((int(limit), used - int(statistics.get(cache_name, 0))))
    return found


def peak_rss_bytes() -> int:
    """Return the largest resident set that this process had so far (VmHWM), in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return rss_bytes()


def rss_bytes() -> int:
    """Return the resident set of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def give_back_freed() -> None:
    """Have malloc give back to the system what is free, also between what is in use; does nothing outside of glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
