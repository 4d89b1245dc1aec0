"""The `plan` of the Python API, and the first half of opening a session: all that needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from switchrun.checkpoint.types import SwitchCheckpoint
    from switchrun.planning.types import Plan


class Offload(NamedTuple):
    """Where switchrun may write, and how many bytes the experts that it writes may take there."""

    folder: Path
    limit_bytes: int | None


class Prepared(NamedTuple):
    """A checkpoint, the plan made for it, and where packed experts are kept."""

    checkpoint: SwitchCheckpoint
    plan: Plan
    offload: Offload


def prepare(
    model: str | Path | None = None,
    *,
    dtype: str = "auto",
    cpu_memory: str | int | None = None,
    gpu_memory: str | int | None = None,
    offload_folder: str | Path | None = None,
    offload_limit: str | int | None = None,
    device_map: str | Path | Mapping[str, Any] | None = None,
    batch_size: int = 1,
    num_beams: int = 1,
    input_tokens: int = 24,
    output_tokens: int = 12,
    disk_bandwidth: float | Literal["measure"] | None = None,
) -> Prepared:
    """Open a checkpoint's headers and plan for it; the arguments and errors are those of `plan` and `Session.open`."""
    from switchrun import folders, hardware
    from switchrun.checkpoint import open_checkpoint
    from switchrun.planning import make_plan, resolve_budgets
    from switchrun.planning.device_map import read_device_map
    from switchrun.planning.estimate import Bandwidth

    given_map = None if device_map is None or device_map == "auto" else read_device_map(device_map)
    if gpu_memory is None and given_map is not None and not any(isinstance(tier, int) for tier in given_map.values()):
        gpu_memory = 0  # no driver is asked for what the map does not use
    budgets = resolve_budgets(cpu_memory, gpu_memory)
    offload = Offload(folders.offload_folder(offload_folder), offload_limit_bytes(offload_limit))
    checkpoint = open_checkpoint(None if model is None else str(model), cache_dir=offload.folder / "index")
    expert_file = next(iter(checkpoint.experts.values())).wi.file
    if disk_bandwidth == "measure":
        measure_disk(checkpoint)
        disk_bandwidth = None
    measured = hardware.known_bandwidth(expert_file)
    bandwidth = None
    if disk_bandwidth:
        bandwidth = Bandwidth(disk_bandwidth, "given")
    elif measured:
        bandwidth = Bandwidth(measured, "measured")
    plan = make_plan(
        checkpoint,
        budgets,
        dtype=dtype,
        batch_size=batch_size,
        num_beams=num_beams,
        device_map=given_map,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        bandwidth=bandwidth,
        stored_share=_stored_share(checkpoint, dtype, offload.folder),
    )
    return Prepared(checkpoint, plan, offload)


def offload_limit_bytes(limit: str | int | None) -> int | None:
    """Give the bytes of a limit like `200GB`.

    Raises:
        UsageError: It is not a size.
    """
    from switchrun.units import parse_bytes

    return parse_bytes(limit) if isinstance(limit, str) else limit


def _stored_share(checkpoint: SwitchCheckpoint, dtype: str, folder: Path) -> float:
    """Give which share of a model's experts is in the offload folder already; 0 for what is never kept there.

    Raises:
        CorruptCheckpointError: What is kept there belongs to something else, so that a session would refuse it.
    """
    from switchrun.dtypes import resolve_dtype
    from switchrun.store import open_checkpoint_store, stored_experts

    packed = resolve_dtype(dtype, checkpoint.stored_dtype, checkpoint.plain_dtype).packed
    if packed is None or checkpoint.has_int8_experts:
        return 0.0
    store = open_checkpoint_store(folder, checkpoint, packed.value, read_only=True)
    return min(1.0, sum(1 for _ in stored_experts(store.folder)) / len(checkpoint.experts))


def measure_disk(checkpoint: SwitchCheckpoint) -> None:
    """Read experts here and there for half a second, and remember how fast that was."""
    import random

    from switchrun import hardware

    keys = list(checkpoint.experts)
    chosen = [checkpoint.experts[key] for key in random.sample(keys, min(len(keys), 200))]
    ranges = [(tensor.file, tensor.offset, tensor.nbytes) for slices in chosen for tensor in slices]
    rate = hardware.measure_read_bandwidth(ranges)
    if rate is not None and not hardware.is_sparse(ranges[0][0]):
        hardware.remember_bandwidth(ranges[0][0], rate)


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
    """Say which weights of a model would go where and what a fill would cost, from its headers alone.

    Args:
        model: A folder, a Hub id with an optional `@revision`, or None for the demo model.
        dtype: `auto` (as stored), `fp32`, `bf16`, `int8` or `nf4`.
        cpu_memory: What the process may take, such as `6GiB`; most of what is available if None.
        gpu_memory: What may be taken on GPUs, such as `6GiB` (of the first one) or `0=6GiB,1=20GiB`; 0 is no GPU, None
            what is free on all GPUs less a reserve. None initialises CUDA in this process if there is a driver.
        offload_folder: Where switchrun writes; see `switchrun.folders.offload_folder` for the default.
        device_map: A device map, or a file with one; None or `auto` lets the planner decide.
        batch_size: Inputs that run together.
        num_beams: Beams of each input.
        input_tokens: Tokens of an input, for the estimate.
        output_tokens: Tokens generated, for the estimate.
        disk_bandwidth: Bytes per second, or `measure` to read experts for half a second; if None, what was last
            measured on that disk, else an assumption.

    Raises:
        SwitchrunError: One of its kinds; see `switchrun.errors`.
    """
    return prepare(
        model,
        dtype=dtype,
        cpu_memory=cpu_memory,
        gpu_memory=gpu_memory,
        offload_folder=offload_folder,
        device_map=device_map,
        batch_size=batch_size,
        num_beams=num_beams,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        disk_bandwidth=disk_bandwidth,
    ).plan
