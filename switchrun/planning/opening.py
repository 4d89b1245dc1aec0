"""The first half of opening a model: all that needs no torch, up to the plan."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.locate import hub_id
from switchrun.checkpoint.types import HubWay, SwitchCheckpoint
from switchrun.dtypes import PackedDtype
from switchrun.errors import check_count
from switchrun.machine import disks, network, ram
from switchrun.planning.budgets import parse_rate, resolve_budgets
from switchrun.planning.memory import PYTHON_BYTES, RUNTIME_BYTES
from switchrun.planning.options import OpenOptions
from switchrun.planning.plan import ASSUMED_BANDWIDTH, ASSUMED_NETWORK, Bandwidth, HubState, Plan
from switchrun.planning.planner import make_plan
from switchrun.store import expert_path, model_name, open_checkpoint_store, store_folder, stored_experts
from switchrun.units import format_seconds

if TYPE_CHECKING:
    from switchrun.checkpoint.remote import HubRanges

_log = logging.getLogger(__name__)

#: Tokens that fill a sentence, of those that it may take: what a session expects to generate from the Hub.
EXPECTED_NEW_TOKENS = 12
#: Experts that are read at most to measure a disk.
_SAMPLE = 200
#: What experts that are kept as they are stored are called by, and what a file takes besides.
_KEPT_AS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "I8": "int8"}
_HEADER_BYTES = 4096


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A checkpoint, what it is opened with, and the plan made for it.

    `own_bytes` is what the caller's process held before, besides Python and the libraries. `hub` reads the weights from
    the Hub, if they come from there: whoever opens the model closes it, and who only plans calls `close`.
    """

    options: OpenOptions
    checkpoint: SwitchCheckpoint
    plan: Plan
    own_bytes: int = 0
    hub: HubRanges | None = None

    def close(self) -> None:
        """End all reads from the Hub."""
        if self.hub is not None:
            self.hub.close()


def plan_model(
    options: OpenOptions,
    *,
    input_tokens: int = 24,
    disk_bandwidth: str | float | None = None,
    hub_output_tokens: int | None = None,
    warn: Callable[[str], None] | None = None,
) -> PlannedModel:
    """Open a checkpoint's headers and plan for it.

    The disk's bandwidth, for the estimate, is in bytes per second or like `1.8GB/s`, or `measure` to read experts for
    half a second; None is what was last measured on that disk, else an assumption. `hub_output_tokens` is how many
    tokens are expected of a fill that reads from the Hub, if fewer than it may generate; `warn` gets warnings, from any
    thread.

    Raises:
        SwitchrunError: One of its kinds; see `switchrun.errors`.
    """
    check_count("input_tokens", input_tokens)
    rate = None if disk_bandwidth == "measure" else parse_rate("disk_bandwidth", disk_bandwidth)
    libraries = RUNTIME_BYTES if "torch" in sys.modules else PYTHON_BYTES
    own_bytes = max(0, ram.rss_bytes() - libraries)
    budgets = resolve_budgets(options.cpu_bytes, options.gpu_bytes)
    model = None if options.model is None else str(options.model)
    with ExitStack() as stack:
        ranges = _hub_ranges(model, warn or _log.warning, stack)
        checkpoint = open_checkpoint(model, cache_dir=options.folder / "index", way=HubWay(options.hub), ranges=ranges)
        hub = ranges if checkpoint.hub is not None else None
        kept = _kept_experts(checkpoint, options)
        if disk_bandwidth == "measure":
            measure_disk(checkpoint, kept.folder)
        plan = make_plan(
            checkpoint,
            budgets,
            dtype=options.dtype,
            batch_size=options.batch_size,
            num_beams=options.num_beams,
            device_map=options.tiers,
            input_tokens=input_tokens,
            output_tokens=options.max_new_tokens,
            bandwidth=Bandwidth(rate, "given") if rate else disk_of(checkpoint, options.folder),
            stored_share=min(1.0, kept.experts / len(checkpoint.experts)),
            hub=None if hub is None else _hub_state(checkpoint, options, kept, hub.traffic.bytes),
            hub_output_tokens=hub_output_tokens,
        )
        if hub is not None:
            stack.pop_all()
    return PlannedModel(options, checkpoint, plan, own_bytes, hub)


def _hub_ranges(model: str | None, warn: Callable[[str], None], stack: ExitStack) -> HubRanges | None:
    if hub_id(model) is None:
        return None
    from switchrun.checkpoint.remote import HubRanges

    def on_wait(seconds: float) -> None:
        warn(f"the Hub asks to wait {format_seconds(seconds)} (its rate limit)")

    return stack.enter_context(HubRanges(on_wait=on_wait))


class _KeptExperts(NamedTuple):
    """What the offload folder holds of a model's experts, in the form that they are kept in."""

    folder: Path | None
    experts: int = 0
    nbytes: int = 0
    file_bytes: int = 0


def _kept_experts(checkpoint: SwitchCheckpoint, options: OpenOptions) -> _KeptExperts:
    """Look at what is kept. What is kept there for something else is refused, as a session would refuse it."""
    if options.dtype in list(PackedDtype) and not checkpoint.reads_int8_in_place:
        store = open_checkpoint_store(options.folder, checkpoint, options.dtype, read_only=True)
        folder, file_bytes = store.folder, store.file_bytes
    elif checkpoint.hub is not None:
        folder = store_folder(options.folder, model_name(checkpoint), _KEPT_AS[checkpoint.stored_dtype])
        file_bytes = checkpoint.expert_bytes + _HEADER_BYTES
    else:
        return _KeptExperts(None)
    sizes = [status.st_size for _, status in stored_experts(folder)]
    return _KeptExperts(folder, len(sizes), sum(sizes), file_bytes)


def _hub_state(checkpoint: SwitchCheckpoint, options: OpenOptions, kept: _KeptExperts, index_bytes: int) -> HubState:
    folder = options.folder.absolute()
    measured = network.known_bandwidth()
    assumed = ASSUMED_NETWORK if measured is None else Bandwidth(measured, "measured")
    try:
        dense_bytes = (store_folder(folder, model_name(checkpoint), "dense") / "dense.safetensors").stat().st_size
    except OSError:
        dense_bytes = 0
    return HubState(
        folder=str(folder),
        free_bytes=disks.free_bytes(folder),
        kept_experts=kept.experts,
        kept_bytes=kept.nbytes,
        kept_dense_bytes=dense_bytes,
        file_bytes=kept.file_bytes,
        limit_bytes=options.limit_bytes,
        network=Bandwidth(options.network_rate, "given") if options.network_rate else assumed,
        index_bytes=index_bytes,
    )


def disk_of(checkpoint: SwitchCheckpoint, offload: Path) -> Bandwidth:
    """Return the read bandwidth of the disk that experts are read from: as last measured, else an assumption.

    That is the checkpoint's disk, or the offload folder's for a checkpoint on the Hub.
    """
    file = next(iter(checkpoint.experts.values())).wi.file
    measured = disks.known_bandwidth(file if isinstance(file, Path) else offload)
    return Bandwidth(measured, "measured") if measured else ASSUMED_BANDWIDTH


def measure_disk(checkpoint: SwitchCheckpoint, kept: Path | None = None) -> None:
    """Read experts here and there for half a second, and remember how fast that was.

    Those of a checkpoint on the Hub are read where they are `kept`; if none is, nothing is measured.
    """
    ranges: list[tuple[Path, int, int]] = []
    if checkpoint.hub is None:
        keys = list(checkpoint.experts)
        chosen = [checkpoint.experts[key] for key in random.sample(keys, min(len(keys), _SAMPLE))]
        ranges = [(Path(str(each.file)), each.offset, each.nbytes) for slices in chosen for each in slices]
    elif kept is not None:
        there = list(stored_experts(kept))
        chosen_files = random.sample(there, min(len(there), _SAMPLE))
        ranges = [(expert_path(kept, key), 0, status.st_size) for key, status in chosen_files]
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
    disk_bandwidth: str | float | None = None,
    hub: str = "auto",
    network_bandwidth: str | float | None = None,
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
        hub=hub,
        network_bandwidth=network_bandwidth,
    )
    with closing(plan_model(options, input_tokens=input_tokens, disk_bandwidth=disk_bandwidth)) as planned:
        return planned.plan
