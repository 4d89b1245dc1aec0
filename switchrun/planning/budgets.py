"""Budgets: the bytes that the user allows on each tier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from switchrun.errors import UsageError
from switchrun.machine import gpus, ram
from switchrun.units import MIB, parse_bytes

#: Without `--cpu-memory`, this share of the memory that is available is taken; the rest is the user's.
DEFAULT_CPU_SHARE = 0.8
#: Without `--gpu-memory`, this much of what is free on a GPU is left, or this share of all its memory if that is more:
#: for CUDA's own context, for what torch's allocator takes and cannot give out, and for a screen. Chosen, not measured.
GPU_RESERVE_BYTES = 512 * MIB
GPU_RESERVE_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes allowed in CPU memory (the whole process's resident set) and on each GPU, by its number.

    On a GPU they bound what torch allocates there; CUDA's context comes on top. `notes` say why a GPU that is there has
    no budget although nobody refused it one, a sentence each.
    """

    cpu_bytes: int
    gpu_bytes: Mapping[int, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def resolve_budgets(cpu_memory: str | int | None, gpu_memory: str | int | Mapping[int, int] | None) -> Budgets:
    """Turn what is allowed into bytes.

    Args:
        cpu_memory: A size such as `6GiB`, bytes, or None for most of what is available.
        gpu_memory: A size for the first GPU, `0=6GiB,1=20GiB` or bytes by number for several, 0 for no GPU, or None for
            what is free on all GPUs that CUDA shows, less a reserve. Only None asks the driver, and only if torch is
            built for CUDA.

    Raises:
        UsageError: Something is not a size, or a GPU is named twice.
    """
    if cpu_memory is None:
        cpu_memory = int(ram.available_memory_bytes() * DEFAULT_CPU_SHARE)
    cpu_bytes = parse_size("cpu_memory", cpu_memory)
    allowed, notes = _free_gpus() if gpu_memory is None else (parse_gpu_memory(gpu_memory), ())
    sizes = {number: size for number, size in allowed.items() if size}
    return Budgets(cpu_bytes, sizes, notes)


def parse_size(option: str, size: object) -> int:
    """Return a number of bytes, given as such or like `6GiB`.

    Raises:
        UsageError: It is neither, or negative; the message begins with the option.
    """
    if isinstance(size, str):
        try:
            return parse_bytes(size)
        except UsageError as error:
            raise UsageError(f"{option}: {error.message}", error.hint, option) from None
    if type(size) is not int or size < 0:
        raise UsageError(
            f"{option}: {size!r} is not a size", "give bytes as a whole number, or a text like '6GiB'", option
        )
    return size


def parse_rate(option: str, rate: object) -> float | None:
    """Return bytes per second, given as such or like `12MB/s`; None if None is given.

    Raises:
        UsageError: It is neither, or nothing at all; the message begins with the option.
    """
    if rate is None:
        return None
    found: object = rate
    if isinstance(rate, str):
        try:
            found = parse_bytes(rate.strip().removesuffix("/s"))
        except UsageError:
            found = None
    if type(found) not in (int, float) or not 0 < found < math.inf:  # type: ignore[operator] # it is a number
        shown = f"'{rate}'" if isinstance(rate, str) else repr(rate)
        raise UsageError(f"{option}: {shown} is not a rate", "write it like 1.8GB/s or 500MB/s", option)
    return float(found)  # type: ignore[arg-type] # as above


def parse_gpu_memory(gpu_memory: str | int | Mapping[int, int]) -> dict[int, int]:
    """Return the bytes allowed on each GPU by its number; see `resolve_budgets`.

    Raises:
        UsageError: Something is not a size, or a GPU is named twice.
    """
    option = "gpu_memory"
    if isinstance(gpu_memory, Mapping):
        return dict(gpu_memory)
    if not isinstance(gpu_memory, str) or "=" not in gpu_memory:
        return {0: parse_size(option, gpu_memory)}
    sizes: dict[int, int] = {}
    for part in gpu_memory.split(","):
        number, _, size = part.partition("=")
        if not number.strip().isdecimal() or int(number) in sizes:
            hint = "write it like 6GiB or 0=6GiB,1=20GiB"
            raise UsageError(f"{option}: '{gpu_memory}' is not a GPU budget", hint, option)
        sizes[int(number)] = parse_size(option, size)
    return sizes


def _free_gpus() -> tuple[dict[int, int], tuple[str, ...]]:
    """Return what is free on each GPU less the reserve; none, and why, if torch cannot use them."""
    if gpus.torch_cuda() is None:
        return {}, ()
    too_old = gpus.driver_too_old()
    if too_old:
        return {}, (f"no GPU is used: {too_old}; update it, or see switchrun doctor",)
    reserves = {gpu: max(GPU_RESERVE_BYTES, int(gpu.total_bytes * GPU_RESERVE_SHARE)) for gpu in gpus.visible_gpus()}
    return {gpu.number: max(0, gpu.free_bytes - reserve) for gpu, reserve in reserves.items()}, ()
