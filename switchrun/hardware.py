"""What this machine has: memory (container limits too), disk bandwidth, instructions. No torch."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from switchrun.folders import cache_folder

_CGROUP = Path("/sys/fs/cgroup")
_CPUINFO = Path("/proc/cpuinfo")
#: How Linux names products of bfloat16: AVX-512's, AMX's, arm64's.
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


def available_memory_bytes() -> int:
    """Give the memory that this process may still take: the machine's, or its container's if that is less."""
    available = int(psutil.virtual_memory().available)
    room = [limit - used for limit, used in memory_limits()]
    return max(0, min([available, *room]))


def memory_limits() -> list[tuple[int, int]]:
    """Give (limit, use) in bytes of every memory cgroup that holds this process, v2 and v1, up to the root."""
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


@cache
def has_bf16_instructions() -> bool:
    """Return whether this processor multiplies bfloat16 itself; False where the system doesn't say.

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
    """Give the time since this process was started, to a hundredth of a second."""
    # After the command's name, which may hold spaces, `starttime` is field 22 of 52: the 20th.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def peak_rss_bytes() -> int:
    """Give the largest resident set that this process had so far (VmHWM), in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return rss_bytes()


def rss_bytes() -> int:
    """Give the resident set of this process now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def measure_read_bandwidth(ranges: Iterable[tuple[Path, int, int]], seconds: float = 0.5) -> float | None:
    """Read byte ranges past the page cache for a while and give the bandwidth.

    Args:
        ranges: (file, offset, length) of what to read, in order; it stops when they end or the time is up.
        seconds: How long to read.

    Returns:
        Bytes per second; None where the filesystem refuses `O_DIRECT` or nothing could be read, since a figure
        from the page cache would be wrong by an order.
    """
    chunk = 8 * 1024**2
    buffer = mmap.mmap(-1, chunk)
    buffer.write(b"\0" * chunk)  # touched before the clock starts: new pages are slower than many disks
    done, start = 0, time.perf_counter()
    try:
        for path, offset, length in ranges:
            file = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                for position in range(offset & ~4095, offset + length, chunk):
                    done += os.preadv(file, [buffer], position)
                    if time.perf_counter() - start > seconds:
                        return done / (time.perf_counter() - start)
            finally:
                os.close(file)
    except (OSError, AttributeError):
        return None
    return done / (time.perf_counter() - start) if done else None


def device_of(path: Path) -> str:
    """Name the block device that a path lies on, for figures that belong to a device."""
    return f"{os.major(path.stat().st_dev)}:{os.minor(path.stat().st_dev)}"


def filesystem_of(path: Path) -> str | None:
    """Name the type of the filesystem that a path lies on (`ext4`, `nfs4`); None where the system does not tell."""
    path, found, depth = path.resolve(), None, -1
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        # Not by the device's number: btrfs gives its files another one than its mounts.
        place = Path(fields[4].encode().decode("unicode_escape"))
        # Of several mounts on one folder the last is on top.
        if path.is_relative_to(place) and len(place.parts) >= depth:
            found, depth = fields[fields.index("-") + 1], len(place.parts)
    return found


def is_sparse(path: Path) -> bool:
    """Tell whether a file has holes, which are read faster than any disk."""
    status = path.stat()
    return status.st_blocks * 512 < status.st_size * 0.9


def remember_bandwidth(path: Path, bytes_per_second: float) -> None:
    """Keep a measured read bandwidth for the device that `path` lies on."""
    remember("bandwidth", path, bytes_per_second)


def known_bandwidth(path: Path) -> float | None:
    """Give the read bandwidth that was last measured on the device that `path` lies on, in bytes per second."""
    known = recall("bandwidth", path)
    return float(known) if isinstance(known, int | float) and 0 < known < float("inf") else None


def remember(what: str, path: Path, value: Any) -> None:
    """Keep something about the device that `path` lies on, as JSON; a cache that cannot be written is let be."""
    file = cache_folder() / f"{what}.json"
    with contextlib.suppress(OSError):
        known = _remembered(what) | {device_of(path): value}
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(file)


def recall(what: str, path: Path) -> Any:
    """Give what was kept about the device that `path` lies on; None if nothing was."""
    return _remembered(what).get(device_of(path))


def _remembered(what: str) -> dict[str, Any]:
    try:
        known = json.loads((cache_folder() / f"{what}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
