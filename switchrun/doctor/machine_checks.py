"""What a fill needs, as far as it can be looked at without torch: packages, memory, disks, the model."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import random
import shutil
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.locate import NotDownloadedError
from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.doctor.check import Check, Problem
from switchrun.errors import BudgetError, StorageError, SwitchrunError
from switchrun.machine import disks, folders, ram
from switchrun.planning import Budgets
from switchrun.planning.budgets import DEFAULT_CPU_SHARE
from switchrun.planning.memory import RUNTIME_BYTES
from switchrun.planning.planner import make_plan
from switchrun.units import GIB, MIB, format_bytes, format_rate

#: What is written at most to measure a disk.
_SAMPLE_BYTES = 256 * MIB
_Ranges = Sequence[tuple[Path, int, int]]  # (file, offset, length)
_MAIN = ("torch", "transformers", "accelerate", "bitsandbytes")
_NETWORK = "nfs nfs4 cifs smb3 smbfs 9p ceph lustre beegfs gpfs glusterfs afs".split()
_SEE = "see docs/troubleshooting.md"


def check_packages() -> Check:
    """Are the packages installed, in the versions that switchrun needs?"""
    from packaging.requirements import Requirement

    versions: dict[str, str] = {}
    problems, install = [], ["pip install"]
    for needed in map(Requirement, needed_requirements()):
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[needed.name] = importlib.metadata.version(needed.name)
        version = versions.get(needed.name)
        # A pre-release was installed on purpose; what matters is its number.
        if version is None or not needed.specifier.contains(version, prereleases=True):
            found = "is not installed" if version is None else f"{version} is installed"
            problems.append(f"{needed.name} {found}; needed is {needed.name}{needed.specifier}")
            install.append(f"'{needed.name}{needed.specifier}'")
    if problems:
        return Check("packages", "; ".join(problems), " ".join(install), SwitchrunError)
    main = [f"{name} {versions[name]}" for name in _MAIN if name in versions]
    return Check("packages", f"{', '.join(main)}, and {len(versions)} packages in all, as needed")


def needed_requirements() -> list[str]:
    """Return what switchrun needs, in a clone by its own pyproject.toml: an editable installation may remember less."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.exists():
        return list(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])
    return importlib.metadata.requires("switchrun") or []


def check_memory() -> Check:
    """How much memory may a process take, and does a container limit it?"""
    total = ram.total_memory_bytes()
    available = ram.available_memory_bytes()
    container = min((limit for limit, _ in ram.memory_limits() if limit < total), default=None)
    details = {"total_bytes": total, "available_bytes": available, "container_limit_bytes": container}
    finding = f"{format_bytes(available)} available of {format_bytes(container or total)}"
    finding += " that the container may take" if container else ""
    hint = "raise the container's limit" if container else "end other programs"
    if available * DEFAULT_CPU_SHARE < RUNTIME_BYTES:
        hint += f"; Python, torch and transformers alone take {format_bytes(RUNTIME_BYTES)}"
        return Check("memory", finding, hint, BudgetError, details)
    if available < 2 * GIB:
        return Check("memory", finding, f"{hint}, or expect few expert slots and many reads", details=details)
    return Check("memory", finding, details=details)


def check_offload_folder(folder: Path, named: bool = True) -> Check:
    """Can it be written, or the one above it where it would be made, and is its disk good? Leaves nothing behind.

    One that nobody `named` is a comfort, without which a fill works: there, a failure is a warning.
    """
    problem = None
    try:
        place = disks.nearest_folder(folder)
        free = shutil.disk_usage(place).free
        if free < GIB:
            problem = ("little room", "make room, or set --offload-folder to a folder on another disk")
        # Without a name it cannot be left behind, whatever ends this process.
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            written, end = 0, time.perf_counter() + 1.0
            while written < min(_SAMPLE_BYTES, free // 10) and time.perf_counter() < end:
                # Random: a filesystem may compress, or keep what is equal once.
                written += file.write(os.urandom(8 * MIB))
            os.fsync(file.fileno())
            # Opened again by this name, it can be read past the page cache.
            sample = Path(f"/proc/self/fd/{file.fileno()}")
            return _check_disk("offload folder", folder, [(sample, 0, written)], problem, {"free_bytes": free})
    except OSError as error:
        finding = f"{folder} cannot be written: {error.strerror or error}"
        if folder.is_relative_to(folders.NOWHERE):
            finding = "there is no home folder to keep it in, so nothing is kept from one run to the next"
        hint = "set --offload-folder to a folder that you may write to; switchrun prepare needs one"
        return Check("offload folder", finding, hint, StorageError if named else None, {"path": str(folder)})


def check_checkpoint(checkpoint: SwitchCheckpoint) -> Check:
    """Is the disk of the model good, and are its files whole? Reads experts here and there, as a fill would."""
    keys = random.sample(list(checkpoint.experts), min(len(checkpoint.experts), 200))
    parts = [part for key in keys for part in checkpoint.experts[key]]
    ranges = [(part.file, part.offset, part.nbytes) for part in parts if isinstance(part.file, Path)]
    weights = [file for file in checkpoint.path.iterdir() if file.suffix in (".safetensors", ".bin", ".pt")]
    sparse, problem = sorted(file.name for file in weights if disks.is_sparse(file)), None
    if sparse:
        have = f"and {len(sparse) - 1} more files have" if len(sparse) > 1 else "has"
        hint = "download what is incomplete again; on a filesystem that compresses, whole files look like this too"
        problem = (f"{sparse[0]} {have} holes, which are read as zeros and faster than any disk", hint)
    return _check_disk("checkpoint", checkpoint.path, ranges, problem, {"sparse_files": sparse})


def _check_disk(name: str, folder: Path, ranges: _Ranges, problem: Problem | None, details: Mapping[str, Any]) -> Check:
    """Measure a disk by reading ranges of files, and judge it unless a problem is known already."""
    rate, filesystem = disks.measure_read_bandwidth(ranges), disks.filesystem_of(ranges[0][0])
    details = {"path": str(folder), "filesystem": filesystem, "read_bytes_per_second": rate, **details}
    finding = f"{folder}: {filesystem or 'unknown filesystem'}"
    finding += f", {format_bytes(details['free_bytes'])} free" if "free_bytes" in details else ""
    finding += f", reads {format_rate(rate)}" if rate else ""
    if problem := problem or _judge_disk(filesystem or "", rate):
        return Check(name, f"{finding}; {problem[0]}", problem[1], details=details)
    return Check(name, finding, details=details)


def _judge_disk(filesystem: str, rate: float | None) -> Problem | None:
    if filesystem in ("tmpfs", "ramfs"):
        return "it is memory, and what lies there is missing elsewhere", "use a folder on a disk"
    if filesystem in _NETWORK or filesystem.startswith("fuse."):
        return "it is a network or user-space filesystem", "use a local disk: experts are read in the middle of a fill"
    if rate is None:
        hint = "use a disk with ext4, xfs or btrfs; where memory is limited, the page cache counts too"
        return "it refuses O_DIRECT, so reads go through the page cache", hint
    # Below this, a decoder step of switch-c-2048 (0.77 GB of experts) takes several seconds.
    if rate < 0.2e9:
        hint = "use a faster disk or more --cpu-memory; of a model in 16 bits, --dtype int8 halves what is read"
        return "that is slow", hint
    return None


def open_model(model: str | None, offload_folder: Path) -> SwitchCheckpoint | Exception:
    """Open a model that is here already, and keep its index in the offload folder; `check_model` takes the error."""
    try:
        return open_checkpoint(model, cache_dir=offload_folder / "index", download=False)
    except Exception as error:
        return error


def check_model(opened: SwitchCheckpoint | Exception, budgets: Budgets) -> Check:
    """Did the model open, and does a plan for it fit? Raises an error that a user should never meet."""
    if isinstance(opened, NotDownloadedError):
        return Check("model", opened.message, f"fill reads what it needs from the Hub; or {opened.hint}")
    if isinstance(opened, SwitchrunError):
        return Check("model", opened.message, opened.hint or _SEE, type(opened))
    if isinstance(opened, Exception):
        raise opened
    finding = f"{opened.id}, {format_bytes(opened.total_bytes)} in {opened.stored_dtype}"
    finding += "" if opened.hub is None else " on the Hub"
    finding += f", {len(opened.experts)} experts of {format_bytes(opened.expert_bytes)}"
    try:
        plan = make_plan(opened, budgets)
    except SwitchrunError as error:
        return Check("model", f"{finding}; {error.message}", error.hint or _SEE, type(error))
    for use in plan.tiers:
        if use.budget_bytes:
            finding += f"; {format_bytes(use.budget_bytes)} on {use.tier} hold {use.expert_slots} of them"
    return Check("model", finding)
