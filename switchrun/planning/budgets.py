"""Budgets: the bytes that the user allows on each tier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from switchrun import gpus, hardware
from switchrun.errors import UsageError
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

    On a GPU they bound what torch allocates there. CUDA's context comes on top.

    Attributes:
        cpu_bytes: In CPU memory.
        gpu_bytes: On each GPU.
        notes: Why a GPU that is there has no budget although nobody refused it one, a sentence each.
    """

    cpu_bytes: int
    gpu_bytes: Mapping[int, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def resolve_budgets(cpu_memory: str | int | None, gpu_memory: str | int | None) -> Budgets:
    """Turn the options `--cpu-memory` and `--gpu-memory` into bytes.

    Args:
        cpu_memory: A size such as `6GiB`, bytes, or None for most of what is available.
        gpu_memory: A size for the first GPU, `0=6GiB,1=20GiB` for several, 0 for no GPU, or None for what is free on
            all GPUs that CUDA shows, less a reserve. Only None asks the driver, and only if torch is built for CUDA.

    Raises:
        UsageError: Something is not a size, or a GPU is named twice.
    """
    if cpu_memory is None:
        cpu = int(hardware.available_memory_bytes() * DEFAULT_CPU_SHARE)
    else:
        cpu = cpu_memory if isinstance(cpu_memory, int) else parse_bytes(cpu_memory)
    notes: tuple[str, ...] = ()
    if gpu_memory is None:
        allowed, notes = _free_gpus()
    elif isinstance(gpu_memory, int):
        allowed = {0: gpu_memory}
    else:
        allowed = _parse_gpus(gpu_memory)
    return Budgets(cpu, {number: size for number, size in allowed.items() if size}, notes)


def _free_gpus() -> tuple[dict[int, int], tuple[str, ...]]:
    """Give what is free on each GPU less the reserve; none, and why, if torch cannot use them."""
    if gpus.torch_cuda() is None:
        return {}, ()
    too_old = gpus.driver_too_old()
    if too_old:
        return {}, (f"no GPU is used: {too_old}; update it, or see switchrun doctor",)
    reserves = {gpu: max(GPU_RESERVE_BYTES, int(gpu.total_bytes * GPU_RESERVE_SHARE)) for gpu in gpus.visible_gpus()}
    return {gpu.number: max(0, gpu.free_bytes - reserve) for gpu, reserve in reserves.items()}, ()


def _parse_gpus(text: str) -> dict[int, int]:
    if "=" not in text:
        return {0: parse_bytes(text)}
    sizes: dict[int, int] = {}
    for part in text.split(","):
        number, _, size = part.partition("=")
        if not number.strip().isdecimal() or int(number) in sizes:
            raise UsageError(f"'{text}' is not a GPU budget", "write it like 6GiB or 0=6GiB,1=20GiB")
        sizes[int(number)] = parse_bytes(size)
    return sizes
