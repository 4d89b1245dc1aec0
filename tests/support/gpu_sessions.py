"""Sessions on fake GPUs, over tiny checkpoints, with just so many expert slots on each level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from switchrun import Session
from switchrun.planning.opening import plan_model
from switchrun.planning.options import OpenOptions

PLENTY = 1 << 40


def open_on_gpus(
    folder: Path, device_map: Mapping[str, Any], gpu_slots: int, cpu_slots: int | None = None, **options: Any
) -> Session:
    """Open a session with a device map, a number of slots on each of its GPUs and, if given, in CPU memory."""
    numbers = sorted({tier for tier in device_map.values() if isinstance(tier, int)})
    budgets = ",".join(f"{number}={PLENTY}" for number in numbers)
    options |= {"device_map": device_map, "gpu_memory": budgets or 0, "cpu_memory": PLENTY}
    planned = plan_model(OpenOptions(model=folder, **options))
    plan = planned.plan
    tiers = []
    for use in plan.tiers:
        slots = gpu_slots if use.tier.startswith("gpu:") else cpu_slots if use.tier == "cpu" else None
        count = use.expert_slots if slots is None else min(slots, use.expert_slots)
        tiers.append(replace(use, expert_slots=count, expert_bytes=count * use.slot_bytes))
    return Session(replace(planned, plan=replace(plan, tiers=tuple(tiers))))
