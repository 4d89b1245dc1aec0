"""Do the GPUs, their driver and torch fit together? Never run on a real GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from switchrun.doctor.check import Check, failed, passed, warned
from switchrun.doctor.torch_probe import Answer, build_of
from switchrun.errors import UsageError
from switchrun.machine.gpus import Gpu
from switchrun.units import GIB, MIB, format_bytes, format_count, format_rate

NAME = "gpu"

#: With less free, a GPU holds neither switch-base's dense weights nor slots worth having.
LITTLE_BYTES = GIB
#: With less of its memory free, other processes have most of it.
LITTLE_SHARE = 0.25
#: Of what is free, this share is a budget to try.
_OF_FREE = 0.9
#: Less than PCIe 3.0 at half its width; four lanes of it give 3.9 GB/s at most.
SLOW_BYTES_PER_SECOND = 5e9

_INSTALL = "https://pytorch.org/get-started/locally/"
_OLDER = f"update the driver, or install torch for an older CUDA: {_INSTALL}"


def check_gpus(answer: Answer, wanted: Mapping[int, int] = MappingProxyType({})) -> Check:
    """Hold what torch sees against what the driver sees.

    Args:
        answer: Of the torch probe.
        wanted: The GPUs that a fill would use, by their numbers, and the bytes that it may take there.
    """
    driver: str | None = answer["driver"].get("version")
    visible = [Gpu(**gpu) for gpu in answer["driver"].get("gpus", ())]
    seen: list[dict[str, Any]] = answer["devices"].get("found", [])
    records = [_record(number, device, visible) for number, device in enumerate(seen)]
    details: dict[str, Any] = {
        "driver_version": driver,
        "gpus": records,
        "gpus_of_driver": [gpu.name for gpu in visible],
    }
    works = {number for number, device in enumerate(seen) if "error" not in device}
    missing = sorted(set(wanted) - works)
    problem = _mismatch(answer, len(seen), driver, visible)
    if missing:
        if problem is None and missing[0] < len(seen):
            problem = _device_problem(missing[0], records[missing[0]])
        there = f"gpu:{missing[0]} is asked for, and torch finds {format_count(len(seen), 'GPU')}"
        finding, mend = problem or (there, "correct the GPU's number")
        return failed(NAME, finding, f"{mend}; or do without: --gpu-memory 0", UsageError, **details)
    if problem is None:
        problems = (_device_problem(number, record, wanted.get(number, 0)) for number, record in enumerate(records))
        problem = next(filter(None, problems), None)
    if problem is not None:
        return warned(NAME, *problem, **details)
    if not seen:
        return passed(NAME, "none; everything runs on the CPU", **details)
    with_driver = f"; driver {driver}" if driver else ""
    return passed(NAME, "; ".join(map(_describe, records)) + with_driver, **details)


def _mismatch(answer: Answer, seen: int, driver: str | None, visible: Sequence[Gpu]) -> tuple[str, str] | None:
    """Give what does not fit together, and the mend."""
    torch, error = answer["torch"], answer["devices"].get("error")
    if "error" in answer["driver"]:
        return (
            f"asking the NVIDIA driver failed: {answer['driver']['error']}",
            "try nvidia-smi; install the driver anew",
        )
    has = f"the NVIDIA driver {driver or 'of an unknown version'} shows {visible[0].name}" if visible else ""
    if "version" not in torch:
        return (f"{has}, and torch does not work", "mend torch first") if visible else None
    build = build_of(torch)
    if visible and build == "CPU":
        return f"{has}, and torch is a CPU build, which cannot use it", f"install a CUDA build of torch: {_INSTALL}"
    if answer["driver"].get("too_old"):
        return answer["driver"]["too_old"], _OLDER
    if torch["cuda"] and driver is None:
        return (
            f"torch is built for {build}, and there is no NVIDIA driver",
            "install the driver (in a container: --gpus all); without a GPU, the CPU build of torch is smaller",
        )
    if torch["cuda"] and not visible and not seen:
        return f"the NVIDIA driver {driver} shows no GPU", "see nvidia-smi, and what CUDA_VISIBLE_DEVICES is set to"
    if error:
        return f"torch cannot use the GPU: {error}", _OLDER
    if torch["cuda"] and seen < len(visible):
        return (
            f"the driver shows {format_count(len(visible), 'GPU')}, and torch, built for {build}, {seen}",
            _OLDER,
        )
    return None


def _device_problem(number: int, device: Mapping[str, Any], allowed: int = 0) -> tuple[str, str] | None:
    """Give what is wrong with a GPU of which a fill may take so many bytes, and the mend."""
    name = f"{device['device']}, {device['name'] or 'a GPU'},"
    if device["error"]:
        return f"{name} does not work: {device['error']}", f"install a build of torch for this GPU: {_INSTALL}"
    free, total = device["free_bytes"], device["total_bytes"]
    left = f"{name} has {format_bytes(free)} of {format_bytes(total)} free"
    if allowed > free:
        smaller = f"--gpu-memory {number}={int(free * _OF_FREE) // MIB}MiB"
        return (
            f"{left}, {format_bytes(allowed)} is allowed",
            f"see what else is on it with nvidia-smi, or try {smaller}",
        )
    if free < max(LITTLE_BYTES, total * LITTLE_SHARE):
        return left, "see what else is on it with nvidia-smi, or leave it out of --gpu-memory"
    if device["page_lock_error"]:
        return (
            f"host memory cannot be page-locked: {device['page_lock_error']}",
            "raise the limit: ulimit -l unlimited (in a container: --ulimit memlock=-1)",
        )
    rate = device["host_to_device_bytes_per_second"]
    if rate < SLOW_BYTES_PER_SECOND:
        return (
            f"{name} takes {format_rate(rate)} from host memory, which is slow",
            "see whether it has all its PCIe lanes: nvidia-smi -q, Link Width",
        )
    return None


def _describe(device: Mapping[str, Any]) -> str:
    free, total = format_bytes(device["free_bytes"]), format_bytes(device["total_bytes"])
    rate = format_rate(device["host_to_device_bytes_per_second"])
    bf16 = device["bf16_instructions"]
    words = "" if bf16 is None else ", bf16 instructions" if bf16 else ", no bf16 instructions: bf16 is slow there"
    return f"{device['device']} {device['name']}, {free} of {total} free{words}, {rate} from host memory"


def _record(number: int, device: Mapping[str, Any], visible: Sequence[Gpu]) -> dict[str, Any]:
    """Give a device for JSON; what is free by the driver's word, where torch's own context takes none of it."""
    free = next((gpu.free_bytes for gpu in visible if gpu.number == number), device.get("free_bytes"))
    keys = (
        "device",
        "name",
        "total_bytes",
        "bf16_instructions",
        "host_to_device_bytes_per_second",
        "page_lock_error",
        "error",
    )
    return {key: device.get(key) for key in keys} | {"free_bytes": free}
