"""What a measurement was made on: versions, processor, memory, disk. No torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from switchrun import __version__
from switchrun.machine import disks, ram

_PACKAGES = ("torch", "transformers", "accelerate")


def describe_environment(checkpoint: Path) -> dict[str, Any]:
    """Give it as plain values for JSON.

    Args:
        checkpoint: The folder whose disk is told.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "switchrun": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(psutil.virtual_memory().total),
        "available_memory_bytes": ram.available_memory_bytes(),
        "disk": _disk(checkpoint),
        "kernel": platform.release(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _disk(path: Path) -> dict[str, str | None]:
    device = disks.device_of(path)
    block = Path("/sys/dev/block") / device
    name = block.resolve().name if block.exists() else None
    model = next((text for place in (block, block.parent) if (text := _read(place / "device" / "model"))), None)
    return {"number": device, "name": name, "model": model, "filesystem": disks.filesystem_of(path)}


def _read(file: Path) -> str:
    try:
        return file.resolve().read_text().strip()
    except OSError:
        return ""
