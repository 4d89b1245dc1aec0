"""A limit on memory that counts the page cache too: a control group of our own, of either version."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class _Version:
    limit: str
    swap: str


_V1 = _Version("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
_V2 = _Version("memory.max", "memory.swap.max")


class MemoryGroup:
    """A control group with a memory limit; leaving the context removes it.

    Args:
        limit_bytes: What its processes and their page cache may take together.
        root: Where control groups are mounted.
        membership: The file that lists the groups of this process.

    Raises:
        OSError: No place was found where a group can be made: run as root, or where /sys/fs/cgroup is writable.
    """

    def __init__(self, limit_bytes: int, root: Path = _ROOT, membership: Path = Path("/proc/self/cgroup")) -> None:
        refusals = []
        for parent, version in _places(root, membership):
            folder = parent / f"switchrun-bench-{os.getpid()}-{time.monotonic_ns()}"
            try:
                folder.mkdir()
            except OSError as error:
                refusals.append(f"{parent}: {error.strerror}")
                continue
            try:
                # In version 2 the file is missing where the parent does not hand the controller down.
                with open(folder / version.limit, "r+") as file:
                    file.write(str(limit_bytes))
            except OSError as error:
                _remove(folder)
                refusals.append(f"{parent}: {error.strerror}")
                continue
            self._folder = folder
            # Where swap is counted apart it would be a way round the limit.
            with contextlib.suppress(OSError):
                (folder / version.swap).write_text(str(limit_bytes) if version is _V1 else "0")
            return
        reason = refusals[0] if refusals else "there is no memory controller"
        raise OSError(f"no control group can be made here ({reason})")

    def add(self, pid: int) -> None:
        """Put a process into the group; what it took before stays where it was counted."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(self, *_: object) -> None:
        _remove(self._folder)


def _places(root: Path, membership: Path) -> Iterator[tuple[Path, _Version]]:
    """Yield the groups under which ours could be made: our own, then its ancestors."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, version = root / "memory", _V1
        elif controllers == "":
            top, version = root, _V2
            if not (top / "cgroup.controllers").is_file():
                continue
        else:
            continue
        own = top / group.lstrip("/")
        for place in (own, *own.parents):
            if place.is_relative_to(top) and place.is_dir():
                yield place, version


def _remove(folder: Path) -> None:
    """Remove a group; the kernel needs a moment after its last process has gone."""
    for _ in range(100):
        try:
            folder.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
