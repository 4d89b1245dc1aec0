"""Disks: their filesystem, how fast they read, and what is remembered of them. No torch."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from switchrun.machine import remembered
from switchrun.machine.files import system_lines

_ESCAPED = re.compile(rb"\\([0-3][0-7]{2})")


def measure_read_bandwidth(ranges: Iterable[tuple[Path, int, int]], seconds: float = 0.5) -> float | None:
    """Read ranges (file, offset, length) past the page cache until the time is up; return the bytes per second.

    None where the filesystem refuses `O_DIRECT` or nothing could be read, since a figure from the page cache would be
    wrong by an order.
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
    """Return the number of the block device that a path lies on: `8:1`."""
    device = path.stat().st_dev
    return f"{os.major(device)}:{os.minor(device)}"


class _Mount(NamedTuple):
    type: str
    source: str


def _mount_of(path: Path) -> _Mount | None:
    path, found, depth = path.resolve(), None, -1
    for line in system_lines(Path("/proc/self/mountinfo")):
        about, _, source = line.partition(" - ")
        fields, sources = about.split(" "), source.split(" ")
        if len(fields) < 5 or len(sources) < 2:
            continue
        # Not by the device's number: btrfs gives its files another one than its mounts.
        place = Path(_unescaped(fields[4]))
        # Of several mounts on one folder the last is on top.
        if path.is_relative_to(place) and len(place.parts) >= depth:
            found, depth = _Mount(_unescaped(sources[0]), _unescaped(sources[1])), len(place.parts)
    return found


def _unescaped(field: str) -> str:
    return os.fsdecode(_ESCAPED.sub(lambda digits: bytes([int(digits[1], 8)]), os.fsencode(field)))


def filesystem_of(path: Path) -> str | None:
    """Return the type of the filesystem that a path lies on (`ext4`, `nfs4`); None where the system does not say."""
    mount = _mount_of(path)
    return None if mount is None else mount.type


def filesystem_id(path: Path) -> str | None:
    """Return what identifies the filesystem that a path lies on, from one mount to the next.

    That is a UUID, a block device, or a server and its folder; None if nothing does, as of tmpfs and overlays. The
    device's number would not do: tmpfs, overlays, btrfs and NFS get another one at each mount.
    """
    mount = _mount_of(path)
    if mount is None or "/" not in mount.source:
        return None
    device = Path(mount.source)
    if device.is_relative_to("/dev"):
        with contextlib.suppress(OSError):
            for link in Path("/dev/disk/by-uuid").iterdir():
                if link.resolve() == device.resolve():
                    return f"uuid {link.name}"
    return f"{mount.type} {mount.source}"


def free_bytes(path: Path) -> int:
    """Return what the filesystem has free on which a path lies, or would lie if it was made."""
    place = nearest_folder(path)
    # A link to nothing: whoever writes there says so.
    return shutil.disk_usage(place if place.exists() else place.absolute().parent).free


def nearest_folder(path: Path) -> Path:
    """Return what is there of a path: itself, or the nearest one above it."""
    return next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))


def is_sparse(path: Path) -> bool:
    """Whether a file has holes, which are read faster than any disk."""
    status = path.stat()
    return status.st_blocks * 512 < status.st_size * 0.9


def remember_bandwidth(path: Path, bytes_per_second: float) -> None:
    """Keep a measured read bandwidth for the filesystem that `path` lies on."""
    remember("bandwidth", path, bytes_per_second)


def known_bandwidth(path: Path) -> float | None:
    """Return the read bandwidth that was last measured on the filesystem that `path` lies on, in bytes per second."""
    return remembered.as_rate(recall("bandwidth", path))


def remember(what: str, path: Path, value: Any) -> None:
    """Keep something about the filesystem that `path` lies on, as JSON, if anything identifies that."""
    identity = filesystem_id(path)
    if identity is not None:
        remembered.remember(what, identity, value)


def recall(what: str, path: Path) -> Any:
    """Return what was kept about the filesystem that `path` lies on; None if nothing was."""
    identity = filesystem_id(path)
    return None if identity is None else remembered.recall(what, identity)
