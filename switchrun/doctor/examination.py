"""All checks, one after the other; torch is tried meanwhile in a process of its own."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchrun.checkpoint.locate import hub_id
from switchrun.doctor import disks, gpus, hub, memory, packages
from switchrun.doctor.check import Check, failed
from switchrun.doctor.model import check_model, open_model
from switchrun.doctor.torch_probe import TorchProbe, check_bitsandbytes, check_torch
from switchrun.planning import resolve_budgets


@dataclass(frozen=True, slots=True)
class Questions:
    """What a run of doctor is about.

    Attributes:
        offload_folder: The folder that switchrun would write to.
        model: A folder, a Hub id, or None for the demo model.
        cpu_memory: As the option.
        gpu_memory: As the option.
        online: Whether to ask the Hub.
    """

    offload_folder: Path
    model: str | None = None
    cpu_memory: str | None = None
    gpu_memory: str | None = None
    online: bool = False


def examine(questions: Questions) -> list[Check]:
    """Run every check; blocks for seconds, most of which torch takes to be imported.

    Args:
        questions: What to look at.

    Returns:
        The checks in the order in which they are told.

    Raises:
        UsageError: `cpu_memory` or `gpu_memory` makes no sense.
    """
    with TorchProbe() as probe:
        package = _guarded(packages.NAME, packages.check_packages)
        ram = _guarded(memory.NAME, memory.check_memory)
        # Before the model is opened: its index is kept there, which makes the folder.
        offload = _guarded(disks.OFFLOAD, disks.check_offload_folder, questions.offload_folder)
        opened = open_model(questions.model, questions.offload_folder)
        disk = [] if isinstance(opened, Exception) else [_guarded(disks.CHECKPOINT, disks.check_checkpoint, opened)]
        settings = _guarded(hub.NAME, hub.check_hub, hub_id(questions.model), online=questions.online)
        answer = probe.answer()
    # Now it is known whether the driver can be asked, as a budget that nobody gave may need.
    gpu_memory = "0" if questions.gpu_memory is None and "error" in answer["driver"] else questions.gpu_memory
    budgets = resolve_budgets(questions.cpu_memory, gpu_memory)
    torch = _guarded("torch", check_torch, answer)
    bitsandbytes = _guarded("bitsandbytes", check_bitsandbytes, answer)
    graphics = _guarded(gpus.NAME, gpus.check_gpus, answer, budgets.gpu_bytes)
    plan = _guarded("model", check_model, questions.model, opened, budgets)
    return [package, torch, bitsandbytes, graphics, ram, offload, *disk, settings, plan]


def _guarded(name: str, check: Callable[..., Check], *args: Any, **settings: Any) -> Check:
    """Run a check; if it fails in a way that nobody thought of, that is told in its place, and the others still run."""
    try:
        return check(*args, **settings)
    except Exception as error:
        finding = f"this check itself failed: {type(error).__name__}: {error}"
        mend = "a bug in switchrun: please report it with what --format json says"
        return failed(name, finding, mend, traceback="".join(traceback.format_exception(error)))
