"""The probe for GPUs, on a made-up driver: no real one is at hand."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from switchrun.machine import gpus
from switchrun.machine.gpus import Gpu
from switchrun.units import GIB

NO_DEVICE = 100


@dataclass
class FakeCuda:
    """As much of `libcuda.so.1` as the probe calls: each function fills what it is given and returns an error code."""

    devices: list[tuple[str, uuid.UUID, int]] = field(default_factory=list)  # name, UUID, bytes; in CUDA's order
    errors: dict[str, int] = field(default_factory=dict)
    version: int = 12020

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802 - as CUDA calls it, like those below
        version._obj.value = self.version
        return self.errors.get("cuDriverGetVersion", 0)

    def cuInit(self, flags: int) -> int:  # noqa: N802 - as CUDA calls it, like those below
        return self.errors.get("cuInit", 0)

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.devices)
        return self.errors.get("cuDeviceGetCount", 0)

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        device._obj.value = number
        return self.errors.get(f"cuDeviceGet {number}", 0)

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:  # noqa: N802
        name.value = self.devices[device.value][0].encode()[: size - 1]
        return 0

    def cuDeviceGetUuid_v2(self, identity: Any, device: ctypes.c_int) -> int:  # noqa: N802
        identity.raw = self.devices[device.value][1].bytes
        return 0

    def cuDeviceTotalMem_v2(self, total: Any, device: ctypes.c_int) -> int:  # noqa: N802
        total._obj.value = self.devices[device.value][2]
        return 0


class FakeNvml(ModuleType):
    """As much of `pynvml` as the probe calls; `free` has the bytes by the names that NVML has for its devices."""

    class NVMLError(Exception):
        """NVML's own."""

    def __init__(self, free: dict[str, int], loads: bool = True) -> None:
        super().__init__("pynvml")
        self.free, self.loads, self.open = free, loads, False

    def nvmlInit(self) -> None:  # noqa: N802 - as NVML calls it, like those below
        if not self.loads:
            raise self.NVMLError
        self.open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open = False

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:  # noqa: N802
        if not self.open or name not in self.free:
            raise self.NVMLError
        return name

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        if self.free[handle] < 0:
            raise self.NVMLError  # one memory for CPU and GPU: not supported
        return SimpleNamespace(free=self.free[handle])

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        if not self.open:
            raise self.NVMLError
        return "550.54.15"


SMALL, LARGE = uuid.UUID(int=1), uuid.UUID(int=2)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    library = FakeCuda([("NVIDIA Large", LARGE, 24 * GIB), ("NVIDIA Small", SMALL, 8 * GIB)])
    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": library}.__getitem__)
    return library


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    # NVML sorts by the bus, CUDA the fastest first: only the UUID tells which is which.
    library = FakeNvml({f"GPU-{SMALL}": 7 * GIB, f"GPU-{LARGE}": 20 * GIB})
    monkeypatch.setitem(sys.modules, "pynvml", library)
    return library


def test_gpus_are_numbered_as_cuda_does_and_their_free_memory_is_nvmls(cuda: FakeCuda, nvml: FakeNvml) -> None:
    assert gpus.visible_gpus() == (
        Gpu(0, "NVIDIA Large", 24 * GIB, 20 * GIB),
        Gpu(1, "NVIDIA Small", 8 * GIB, 7 * GIB),
    )
    assert gpus.driver_version() == "550.54.15"
    assert not nvml.open


def test_a_part_of_a_gpu_is_asked_for_by_its_own_name(cuda: FakeCuda, nvml: FakeNvml) -> None:
    nvml.free[f"MIG-{LARGE}"] = nvml.free.pop(f"GPU-{LARGE}") // 2
    assert gpus.visible_gpus()[0].free_bytes == 10 * GIB


@pytest.mark.parametrize("trouble", ["free memory", "cuDeviceGet 0", "unknown to NVML"])
def test_a_gpu_that_cannot_be_asked_is_left_out_and_the_next_keeps_its_number(
    cuda: FakeCuda, nvml: FakeNvml, trouble: str
) -> None:
    if trouble == "free memory":
        nvml.free[f"GPU-{LARGE}"] = -1
    elif trouble == "unknown to NVML":
        del nvml.free[f"GPU-{LARGE}"]
    else:
        cuda.errors[trouble] = NO_DEVICE
    assert gpus.visible_gpus() == (Gpu(1, "NVIDIA Small", 8 * GIB, 7 * GIB),)
    assert not nvml.open


def test_a_driver_without_the_newer_functions_has_no_gpus(
    cuda: FakeCuda, nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(FakeCuda, "cuDeviceGetUuid_v2")
    assert gpus.visible_gpus() == ()


@pytest.mark.parametrize("function", ["cuInit", "cuDeviceGetCount"])
def test_no_gpu_is_visible(cuda: FakeCuda, nvml: FakeNvml, function: str) -> None:
    cuda.errors[function] = NO_DEVICE
    assert gpus.visible_gpus() == ()
    assert gpus.driver_version() == "550.54.15"


@pytest.mark.parametrize(
    ("built_for", "version", "finding"),
    [
        ("12.8", 12020, None),
        ("12.8", 13000, None),
        ("12.8", 11040, "the NVIDIA driver is too old: it is for CUDA 11.4, and torch is built for CUDA 12.8"),
        ("13.0", 12090, "the NVIDIA driver is too old: it is for CUDA 12.9, and torch is built for CUDA 13.0"),
        (None, 11040, None),
    ],
)
def test_a_driver_from_before_torchs_cuda(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, built_for: str | None, version: int, finding: str | None
) -> None:
    monkeypatch.setattr(gpus, "torch_cuda", lambda: built_for)
    cuda.version = version
    assert gpus.driver_too_old() == finding
    cuda.errors["cuDriverGetVersion"] = NO_DEVICE
    assert gpus.driver_too_old() is None


def test_nvml_that_does_not_load_is_no_error(cuda: FakeCuda, nvml: FakeNvml) -> None:
    nvml.loads = False
    assert gpus.visible_gpus() == ()
    assert gpus.driver_version() is None


def test_without_nvmls_library_nothing_is_said(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """With the real pynvml; a warning would fail the test."""
    import pynvml

    def load(name: str) -> FakeCuda:
        if name == "libcuda.so.1":
            return cuda
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(pynvml, "CDLL", load)
    monkeypatch.setattr(pynvml, "nvmlLib", None)
    assert gpus.visible_gpus() == ()
    assert gpus.driver_version() is None
    assert (caplog.messages, *capfd.readouterr()) == ([], "", "")


def test_without_a_driver_nothing_is_imported(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # an import would fail
    monkeypatch.setattr(gpus, "torch_cuda", lambda: "12.8")
    assert gpus.visible_gpus() == ()
    assert gpus.driver_version() is None
    assert gpus.driver_too_old() is None


@pytest.mark.skipif(gpus._load_cuda() is not None, reason="there is a driver here")
def test_the_probe_takes_no_time_without_a_driver() -> None:
    start = time.perf_counter()
    gpus.visible_gpus()
    gpus.driver_version()
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("cuda: str | None = '12.8'", "12.8"),
        ("cuda = None", None),
        ("hip = '6.4'", None),
        ("cuda =", None),
        ("import no_such_module", None),
        (None, None),
    ],
)
def test_what_torch_is_built_for(
    text: str | None, answer: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.machinery.ModuleSpec("torch", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    if text is not None:
        (tmp_path / "version.py").write_text(text)
    assert gpus.torch_cuda() == answer
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpus.torch_cuda() is None


def test_torch_agrees_on_what_it_is_built_for() -> None:
    assert gpus.torch_cuda() == torch.version.cuda


def test_the_probe_needs_no_torch() -> None:
    program = """
import sys
from switchrun.machine import gpus
gpus.visible_gpus()
gpus.driver_too_old()
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
