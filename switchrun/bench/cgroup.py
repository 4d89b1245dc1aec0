"""A limit on memory that counts the page cache too: a control group of our own, of either version."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from switchrun.errors import UsageError

_ROOT = Path("/sys/fs/cgroup")
_HINT = (
    "run as root, in a container with a writable /sys/fs/cgroup, or under "
    "systemd-run --user --scope -p MemoryMax=8G without --memory-limit"
)


@dataclass(frozen=True, slots=True)
class _Version:
    limit: str
    peak: str
    swap: str


_V1 = _Version("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.memsw.limit_in_bytes")
_V2 = _Version("memory.max", "memory.peak", "memory.swap.max")


class MemoryGroup:
    """A control group with a memory limit; leaving the context kills nothing and removes the group.

    Args:
        limit_bytes: What its processes and their page cache may take together.
        root: Where control groups are mounted.
        membership: The file that tells which groups this process is in.

    Raises:
        UsageError: No place was found where a group can be made.
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
            self._folder, self._version = folder, version
            # Where swap is counted apart it would be a way round the limit.
            with contextlib.suppress(OSError):
                (folder / version.swap).write_text(str(limit_bytes) if version is _V1 else "0")
            return
        reason = refusals[0] if refusals else "there is no memory controller"
        raise UsageError(f"--memory-limit: no control group can be made here ({reason})", _HINT)

    def add(self, pid: int) -> None:
        """Put a process into the group; what it took before stays where it was counted.

        Raises:
            UsageError: The system does not let us.
        """
        try:
            (self._folder / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            raise UsageError(f"--memory-limit: {self._folder} takes no process: {error.strerror}", _HINT) from error

    @property
    def peak_file(self) -> Path:
        """Holds the most that the group took so far, page cache included; not there in older kernels' version 2."""
        return self._folder / self._version.peak

    def __enter__(self) -> MemoryGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
