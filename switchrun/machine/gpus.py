"""Which GPUs this process may use and what is free on them, asked of NVIDIA's driver: no torch, no CUDA context.

CUDA's own library says which GPUs are visible and numbers them, so that `CUDA_VISIBLE_DEVICES` and
`CUDA_DEVICE_ORDER` count here just as they do for torch. Only NVML says what is free without a context on the GPU,
which would take some hundred MiB of it; the two know a GPU by the same UUID.

Tried with made-up libraries only: nothing here has met a real driver yet.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import runpy
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_NAME_BYTES = 128


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that this process may use.

    Its number is that of torch and of device maps: the 1 of `cuda:1` and `gpu:1`. What no process has taken is free.
    """

    number: int
    name: str
    total_bytes: int
    free_bytes: int


def visible_gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that CUDA lets this process use, in CUDA's order; none without a driver. Never raises.

    Left out is a GPU whose free memory the driver does not know, as where CPU and GPU share one memory.
    The first call initialises CUDA in this process, as torch would: a child that is forked later cannot use it.
    """
    cuda = _load_cuda()
    if cuda is None:
        return ()
    with _nvml() as nvml:
        if nvml is None:
            return ()
        count = ctypes.c_int()
        if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
            return ()  # no GPU, none visible, or a driver that does not fit its kernel module
        return tuple(gpu for number in range(count.value) if (gpu := _ask(cuda, nvml, number)) is not None)


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, such as `550.54.15`; None without one. Never raises."""
    if _load_cuda() is None:
        return None
    with _nvml() as nvml:
        if nvml is not None:
            with contextlib.suppress(nvml.NVMLError):
                return str(nvml.nvmlSystemGetDriverVersion())
    return None


def torch_cuda() -> str | None:
    """Return the CUDA that the installed torch was built for (`12.8`), from torch's own file. Never raises."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        version = runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")
    except (OSError, SyntaxError, ImportError):
        return None
    return version if isinstance(version, str) else None


def driver_too_old() -> str | None:
    """Return a sentence if the driver is older than the CUDA that torch was built for; else None. Never raises.

    CUDA promises that a driver runs what was built for any later version with the same first number.
    """
    cuda, built_for, known = _load_cuda(), torch_cuda(), ctypes.c_int()
    if cuda is None or built_for is None or cuda.cuDriverGetVersion(ctypes.byref(known)):
        return None
    major, minor = divmod(known.value // 10, 100)
    if major >= int(built_for.partition(".")[0]):
        return None
    return f"the NVIDIA driver is too old: it is for CUDA {major}.{minor}, and torch is built for CUDA {built_for}"


def _load_cuda() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")  # comes with no package: only with the driver
    except OSError:
        return None


@contextlib.contextmanager
def _nvml() -> Iterator[ModuleType | None]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def _ask(cuda: ctypes.CDLL, nvml: ModuleType, number: int) -> Gpu | None:
    device, total = ctypes.c_int(), ctypes.c_size_t()
    name, identity = ctypes.create_string_buffer(_NAME_BYTES), ctypes.create_string_buffer(16)
    try:
        if (
            cuda.cuDeviceGet(ctypes.byref(device), number)
            or cuda.cuDeviceGetName(name, _NAME_BYTES, device)
            or cuda.cuDeviceGetUuid_v2(identity, device)
            or cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
        ):
            return None
    except AttributeError:
        return None  # a driver from before CUDA 11.4, which is too old for torch as well
    free = _free_bytes(nvml, uuid.UUID(bytes=identity.raw))
    return None if free is None else Gpu(number, name.value.decode(errors="replace"), total.value, free)


def _free_bytes(nvml: ModuleType, identity: uuid.UUID) -> int | None:
    for kind in ("GPU", "MIG"):  # a whole GPU, or a part of one
        with contextlib.suppress(nvml.NVMLError):
            return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByUUID(f"{kind}-{identity}")).free)
    return None
