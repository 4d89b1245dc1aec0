"""Answers of the probe as they would be, made up: there is no GPU here."""

from __future__ import annotations

from typing import Any

GIB = 1024**3


def torch_answer(**changes: Any) -> dict[str, Any]:
    """What the probe finds on a machine without a GPU; `changes` replaces whole stages."""
    found = {
        "driver": {"version": None, "too_old": None, "gpus": []},
        "torch": {"version": "2.13.0+cpu", "build": "CPU", "threads": 2},
        "libraries": {},
        "bitsandbytes": {},
        "devices": {"found": []},
        "kernels": kernels("portable", "avx2"),
    }  # fmt: skip
    return found | changes


def kernels(*paths: str, used: str | None = None, **changes: Any) -> dict[str, Any]:
    """What the probe finds of these paths, all of them right and the last in use."""
    used = used or (paths[-1] if paths else None)
    return {"named": "", "paths": list(paths), "unusable": False, "wrong": {}, "used": used} | changes


def driver(*free: int, version: str = "550.54.15") -> dict[str, Any]:
    gpus = [{"number": n, "name": "H100", "total_bytes": 80 * GIB, "free_bytes": size} for n, size in enumerate(free)]
    return {"version": version, "too_old": None, "gpus": gpus}


def cuda_torch() -> dict[str, Any]:
    return torch_answer()["torch"] | {"version": "2.13.0+cu128", "build": "CUDA 12.8"}


def device(number: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "device": f"cuda:{number}",
        "name": "H100",
        "total_bytes": 80 * GIB,
        "free_bytes": 78 * GIB,
    } | changes
