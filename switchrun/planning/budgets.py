"""Budgets: the bytes that the user allows on each tier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from switchrun import hardware
from switchrun.errors import UsageError
from switchrun.units import parse_bytes

#: Without `--cpu-memory`, this share of the memory that is available is taken; the rest is the user's.
DEFAULT_CPU_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes allowed in CPU memory (the whole process's resident set) and on each GPU, by its number."""

    cpu_bytes: int
    gpu_bytes: Mapping[int, int] = field(default_factory=dict)


def resolve_budgets(cpu_memory: str | int | None, gpu_memory: str | int | None) -> Budgets:
    """Turn the options `--cpu-memory` and `--gpu-memory` into bytes.

    Args:
        cpu_memory: A size such as `6GiB`, bytes, or None for most of what is available.
        gpu_memory: A size for the first GPU, `0=6GiB,1=20GiB` for several, or None for no GPU.

    Raises:
        UsageError: Something is not a size, or a GPU is named twice.
    """
    if cpu_memory is None:
        cpu = int(hardware.available_memory_bytes() * DEFAULT_CPU_SHARE)
    else:
        cpu = cpu_memory if isinstance(cpu_memory, int) else parse_bytes(cpu_memory)
    if gpu_memory is None or isinstance(gpu_memory, int):
        gpus = {0: gpu_memory} if gpu_memory else {}
    else:
        gpus = _parse_gpus(gpu_memory)
    return Budgets(cpu, {number: size for number, size in gpus.items() if size})


def _parse_gpus(text: str) -> dict[int, int]:
    if "=" not in text:
        return {0: parse_bytes(text)}
    gpus: dict[int, int] = {}
    for part in text.split(","):
        number, _, size = part.partition("=")
        if not number.strip().isdecimal() or int(number) in gpus:
            raise UsageError(f"'{text}' is not a GPU budget", "write it like 6GiB or 0=6GiB,1=20GiB")
        gpus[int(number)] = parse_bytes(size)
    return gpus
