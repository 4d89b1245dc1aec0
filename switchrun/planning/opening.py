"""The first half of opening a model: all that needs no torch, up to the plan."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.dtypes import PackedDtype
from switchrun.errors import UsageError, check_count
from switchrun.machine import disks, ram
from switchrun.planning.budgets import resolve_budgets
from switchrun.planning.memory import PYTHON_BYTES, RUNTIME_BYTES
from switchrun.planning.options import OpenOptions
from switchrun.planning.plan import ASSUMED_BANDWIDTH, Bandwidth, Plan
from switchrun.planning.planner import make_plan
from switchrun.store import open_checkpoint_store, stored_experts

if TYPE_CHECKING:
    from switchrun.checkpoint.remote import HubRanges


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A checkpoint, what it is opened with, and the plan made for it.

    `own_bytes` is what the caller's process held before, besides Python and the libraries.
    """

    options: OpenOptions
    checkpoint: SwitchCheckpoint
    plan: Plan
    own_bytes: int = 0
    hub: HubRanges | None = None


def plan_model(
    options: OpenOptions, *, input_tokens: int = 24, disk_bandwidth: float | Literal["measure"] | None = None
) -> PlannedModel:
    """Open a checkpoint's headers and plan for it.

    The disk's bandwidth, for the estimate, is in bytes per second, or `measure` to read experts for half a second; None
    is what was last measured on that disk, else an assumption.

    Raises:
        SwitchrunError: One of its kinds; see `switchrun.errors`.
    """
    check_count("input_tokens", input_tokens)
    if disk_bandwidth not in (None, "measure") and not (isinstance(disk_bandwidth, int | float) and disk_bandwidth > 0):
        message = f"disk_bandwidth: {disk_bandwidth!r} is not a rate"
        raise UsageError(message, "give bytes per second, or 'measure'", "disk_bandwidth")
    libraries = RUNTIME_BYTES if "torch" in sys.modules else PYTHON_BYTES
    own_bytes = max(0, ram.rss_bytes() - libraries)
    budgets = resolve_budgets(options.cpu_bytes, options.gpu_bytes)
    model = None if options.model is None else str(options.model)
    checkpoint = open_checkpoint(model, cache_dir=options.folder / "index")
    if disk_bandwidth == "measure":
        measure_disk(checkpoint)
        disk_bandwidth = None
    plan = make_plan(
        checkpoint,
        budgets,
        dtype=options.dtype,
        batch_size=options.batch_size,
        num_beams=options.num_beams,
        device_map=options.tiers,
        input_tokens=input_tokens,
        output_tokens=options.max_new_tokens,
        bandwidth=Bandwidth(disk_bandwidth, "given") if disk_bandwidth else disk_of(checkpoint),
        stored_share=_stored_share(checkpoint, options),
    )
    return PlannedModel(options, checkpoint, plan, own_bytes)


def _stored_share(checkpoint: SwitchCheckpoint, options: OpenOptions) -> float:
    """Return which share of a model's experts is in the offload folder already; 0 for what is never kept there.

    What is kept there for something else is refused, as a session would refuse it.
    """
    if options.dtype not in list(PackedDtype) or checkpoint.reads_int8_in_place:
        return 0.0
    store = open_checkpoint_store(options.folder, checkpoint, options.dtype, read_only=True)
    return min(1.0, sum(1 for _ in stored_experts(store.folder)) / len(checkpoint.experts))


def disk_of(checkpoint: SwitchCheckpoint) -> Bandwidth:
    """Return the read bandwidth of the disk that a checkpoint lies on: as last measured, else an assumption."""
    measured = disks.known_bandwidth(next(iter(checkpoint.experts.values())).wi.file)
    return Bandwidth(measured, "measured") if measured else ASSUMED_BANDWIDTH


def measure_disk(checkpoint: SwitchCheckpoint) -> None:
    """Read experts here and there for half a second, and remember how fast that was."""
    keys = list(checkpoint.experts)
    chosen = [checkpoint.experts[key] for key in random.sample(keys, min(len(keys), 200))]
    ranges = [(tensor.file, tensor.offset, tensor.nbytes) for slices in chosen for tensor in slices]
    rate = disks.measure_read_bandwidth(ranges)
    if rate is not None and not disks.is_sparse(ranges[0][0]):
        disks.remember_bandwidth(ranges[0][0], rate)


def plan(
    model: str | Path | None = None,
    *,
    dtype: str = "auto",
    cpu_memory: str | int | None = None,
    gpu_memory: str | int | None = None,
    offload_folder: str | Path | None = None,
    device_map: str | Path | Mapping[str, Any] | None = None,
    batch_size: int = 1,
    num_beams: int = 1,
    input_tokens: int = 24,
    output_tokens: int = 12,
    disk_bandwidth: float | Literal["measure"] | None = None,
) -> Plan:
    """Return which weights of a model would go where and what a fill would cost, from its headers alone.

    The arguments are those of `OpenOptions` and `plan_model`; `output_tokens` is `max_new_tokens` there.

    Raises:
        SwitchrunError: One of its kinds; see `switchrun.errors`.
    """
    options = OpenOptions(
        model=model,
        dtype=dtype,
        cpu_memory=cpu_memory,
        gpu_memory=gpu_memory,
        offload_folder=offload_folder,
        device_map=device_map,
        batch_size=batch_size,
        num_beams=num_beams,
        max_new_tokens=output_tokens,
    )
    return plan_model(options, input_tokens=input_tokens, disk_bandwidth=disk_bandwidth).plan
