"""`switchrun doctor`: every check, one after the other, while a process of its own tries torch. No torch here."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from switchrun.checkpoint.locate import hub_id
from switchrun.doctor import hub_check, machine_checks, torch_checks
from switchrun.doctor.check import Check
from switchrun.errors import SwitchrunError
from switchrun.machine import folders
from switchrun.planning import resolve_budgets

__all__ = ["Check", "examine"]


def examine(
    offload_folder: str | Path | None,
    model: str | None,
    *,
    cpu_memory: str | None,
    gpu_memory: str | None,
    online: bool,
) -> list[Check]:
    """Run every check and return them in the order to show; blocks for seconds, most of them to import torch.

    The arguments are those of `fill`; the Hub is asked with `online`, and for a model that is named by its id there.

    Raises:
        UsageError: `cpu_memory` or `gpu_memory` makes no sense.
    """
    with torch_checks.TorchProbe() as probe:
        packages = _guarded("packages", machine_checks.check_packages)
        memory = _guarded("memory", machine_checks.check_memory)
        # Before the model is opened: its index is kept there, which makes the folder.
        folder, named = folders.offload_folder(offload_folder), offload_folder is not None
        disks = [_guarded("offload folder", machine_checks.check_offload_folder, folder, named)]
        opened = machine_checks.open_model(model, folder)
        if not isinstance(opened, Exception) and opened.hub is None:
            disks.append(_guarded("checkpoint", machine_checks.check_checkpoint, opened))
        hub = _guarded("hub", hub_check.check_hub, hub_id(model), online)
        answer = probe.answer()
    if gpu_memory is None and "error" in answer["driver"]:
        gpu_memory = "0"  # a driver that could not be asked is not asked again for a budget that nobody set
    budgets = resolve_budgets(cpu_memory, gpu_memory)
    torch = _guarded("torch", torch_checks.check_torch, answer)
    kernels = _guarded("kernels", torch_checks.check_kernels, answer)
    bitsandbytes = _guarded("bitsandbytes", torch_checks.check_bitsandbytes, answer)
    gpu = _guarded("gpu", torch_checks.check_gpus, answer, budgets.gpu_bytes)
    plan = _guarded("model", machine_checks.check_model, opened, budgets)
    return [packages, torch, kernels, bitsandbytes, gpu, memory, *disks, hub, plan]


def _guarded(name: str, check: Callable[..., Check], *args: Any) -> Check:
    """Run a check; one that breaks becomes a failure itself, and the others still run."""
    try:
        return check(*args)
    except Exception as error:
        finding = f"this check itself failed: {type(error).__name__}: {error}"
        hint = "a bug in switchrun: please report it with the output of --format json"
        details = {"traceback": "".join(traceback.format_exception(error))}
        return Check(name, finding, hint, SwitchrunError, details)
