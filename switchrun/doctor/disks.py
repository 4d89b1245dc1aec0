"""How good are the disks: room, right to write, filesystem, and read bandwidth past the page cache?"""

from __future__ import annotations

import errno
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.doctor.check import Check, failed, passed, warned
from switchrun.errors import StorageError
from switchrun.machine import disks
from switchrun.store import expert_path, list_stores, stored_experts
from switchrun.units import GIB, MIB, format_bytes, format_rate

OFFLOAD = "offload folder"
CHECKPOINT = "checkpoint"

#: Below this, a decoder step of switch-c-2048 (0.77 GB of experts) takes several seconds.
SLOW_BYTES_PER_SECOND = 0.2e9
LITTLE_ROOM_BYTES = GIB

#: What is read to measure; no more than this is written for it, and no longer.
_SAMPLE_BYTES = 256 * MIB
_WRITE_SECONDS = 1.0
_BLOCK_BYTES = 8 * MIB
#: With fewer stored bytes than this, a file is written to be read.
_ENOUGH_BYTES = 64 * MIB
_WEIGHTS = (".safetensors", ".bin", ".pt")

_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "lustre", "beegfs", "gpfs", "glusterfs", "afs"}
)
_MEMORY = frozenset({"tmpfs", "ramfs"})

Range = tuple[Path, int, int]


def check_offload_folder(folder: Path) -> Check:
    """Try the folder that switchrun writes to, by writing a file without a name and reading it; nothing is left.

    If the folder is not there, the nearest one above it is tried, where it would be made.
    """
    try:
        place = _existing(folder)
        free = shutil.disk_usage(place).free
        filesystem = disks.filesystem_of(place)
        # Without a name it cannot be left behind, whatever ends this process.
        with tempfile.TemporaryFile(dir=place) as file:
            ranges = _stored_ranges(folder) or list(_written_ranges(file.fileno(), free))
            rate = disks.measure_read_bandwidth(ranges)
            direct = bool(ranges) and _reads_directly(ranges[0][0])
    except OSError as error:
        return failed(
            OFFLOAD,
            f"{folder} cannot be written: {error.strerror or error}",
            "give --offload-folder a folder that you may write to; only fill does without",
            StorageError,
            path=str(folder),
        )
    details = _details(folder, filesystem, free, rate, direct)
    there = "" if folder.exists() else ", not made yet"
    finding = f"{folder}{there}: {_describe(filesystem, free, rate)}"
    problem = _problem(filesystem, direct, rate)
    if free < LITTLE_ROOM_BYTES:
        problem = ("little room", "make room, or give --offload-folder a folder on another disk")
    return _check(OFFLOAD, finding, problem, details)


def check_checkpoint(checkpoint: SwitchCheckpoint) -> Check:
    """Read experts here and there, as a fill would."""
    folder = checkpoint.path
    ranges = list(_expert_ranges(checkpoint))
    rate = disks.measure_read_bandwidth(ranges)
    direct = _reads_directly(ranges[0][0])
    filesystem = disks.filesystem_of(ranges[0][0])
    sparse = sorted(file.name for file in folder.iterdir() if file.suffix in _WEIGHTS and disks.is_sparse(file))
    details = _details(folder, filesystem, shutil.disk_usage(folder).free, rate, direct)
    details["sparse_files"] = sparse
    finding = f"{folder}: {_describe(filesystem, None, rate)}"
    problem = _problem(filesystem, direct, rate)
    if sparse:
        problem = (
            f"{sparse[0]} {f'and {len(sparse) - 1} more files have' if len(sparse) > 1 else 'has'} holes, "
            "which are read as zeros and faster than any disk",
            "download what is incomplete again; if the files are whole and the filesystem compresses them, let it be",
        )
    return _check(CHECKPOINT, finding, problem, details)


def _check(name: str, finding: str, problem: tuple[str, str] | None, details: dict[str, Any]) -> Check:
    if problem is None:
        return passed(name, finding, **details)
    return warned(name, f"{finding}; {problem[0]}", problem[1], **details)


def _details(folder: Path, filesystem: str | None, free: int, rate: float | None, direct: bool) -> dict[str, Any]:
    return {
        "path": str(folder),
        "filesystem": filesystem,
        "free_bytes": free,
        "read_bytes_per_second": rate,
        "direct_reads": direct,
    }


def _describe(filesystem: str | None, free: int | None, rate: float | None) -> str:
    parts = [filesystem or "unknown filesystem"]
    if free is not None:
        parts.append(f"{format_bytes(free)} free")
    if rate is not None:
        parts.append(f"reads {format_rate(rate)}")
    return ", ".join(parts)


def _problem(filesystem: str | None, direct: bool, rate: float | None) -> tuple[str, str] | None:
    """Give what is wrong with a disk, and the mend."""
    kind = filesystem or ""
    if kind in _MEMORY:
        return "it is memory, and what lies there is missing elsewhere", "use a folder on a disk"
    if kind in _NETWORK or kind.startswith("fuse."):
        return "it is a network or user-space filesystem", "use a local disk: experts are read in the middle of a fill"
    if not direct:
        return (
            "it refuses O_DIRECT, so reads go through the page cache",
            "use a disk with ext4, xfs or btrfs; where memory is limited, the page cache counts too",
        )
    if rate is not None and rate < SLOW_BYTES_PER_SECOND:
        return "that is slow", "use a faster disk, more --cpu-memory, or --dtype int8, which halves what is read"
    return None


def _existing(folder: Path) -> Path:
    """Give the folder, or the nearest one above it that is there.

    Raises:
        OSError: It is no folder, or may not be looked at.
    """
    for place in (folder.absolute(), *folder.absolute().parents):
        if place.is_dir():
            return place
        if place.exists() or place.is_symlink():
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return Path("/")


def _reads_directly(file: Path) -> bool:
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _written_ranges(file: int, free: int) -> Iterator[Range]:
    """Write a file to read, for a moment and within a tenth of the room, and yield its ranges."""
    written, end = 0, time.perf_counter() + _WRITE_SECONDS
    while written < min(_SAMPLE_BYTES, free // 10) and time.perf_counter() < end:
        # Random: a filesystem may compress, or keep what is equal once.
        written += os.write(file, os.urandom(_BLOCK_BYTES))
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    # Opened again by this name, it can be read past the page cache.
    yield Path(f"/proc/self/fd/{file}"), 0, written


def _stored_ranges(folder: Path) -> list[Range]:
    """Give stored experts to read, in any order; none if there are too few."""
    ranges = [
        (expert_path(store.folder, key), 0, status.st_size)
        for store in list_stores(folder)
        for key, status in stored_experts(store.folder)
    ]
    random.shuffle(ranges)
    return ranges if sum(size for _, _, size in ranges) >= _ENOUGH_BYTES else []


def _expert_ranges(checkpoint: SwitchCheckpoint) -> Iterator[Range]:
    keys = list(checkpoint.experts)
    for key in random.sample(keys, min(len(keys), 200)):
        for tensor in checkpoint.experts[key]:
            yield tensor.file, tensor.offset, tensor.nbytes
