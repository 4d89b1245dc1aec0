"""Drivers, GPUs and builds of torch that do and do not fit together: all made up, none was ever run."""

from __future__ import annotations

from typing import Any

import pytest

from switchrun.doctor.torch_checks import check_gpus
from tests.doctor.conftest import GIB, cuda_torch, device, driver, torch_answer


def gpu_answer(*devices: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A machine whose driver shows the GPUs that torch sees."""
    shown = driver(*[each["free_bytes"] for each in devices])
    found = {"driver": shown, "torch": cuda_torch(), "devices": {"found": list(devices)}}
    return torch_answer(**(found | changes))


def test_no_gpu() -> None:
    check = check_gpus(torch_answer(), {})
    assert (check.status, check.finding, check.hint) == ("ok", "none; everything runs on the CPU", None)


def test_gpus_that_work() -> None:
    answer = gpu_answer(device(), device(1))
    answer["driver"]["gpus"][0]["free_bytes"] = 79 * GIB
    check = check_gpus(answer, {1: GIB})
    assert (check.status, check.hint) == ("ok", None)
    assert "cuda:0 H100, 79 GiB of 80 GiB free" in check.finding
    assert "cuda:1" in check.finding
    assert "driver 550.54.15" in check.finding


@pytest.mark.parametrize(("free", "allowed", "status"), [(6, 6, "ok"), (6, 7, "warn"), (2, 1, "ok"), (1.9, 1, "warn")])
def test_memory_that_others_have_taken(free: float, allowed: int, status: str) -> None:
    # By the driver's word: torch's own context takes some of it, and is not there in a fill that has its own.
    answer = gpu_answer(device(total_bytes=8 * GIB, free_bytes=int((free - 0.4) * GIB)))
    answer["driver"]["gpus"][0]["free_bytes"] = int(free * GIB)
    check = check_gpus(answer, {0: allowed * GIB})
    assert check.status == status
    if allowed > free:
        assert check.finding == "cuda:0, H100, has 6 GiB of 8 GiB free, 7 GiB is allowed"
        assert check.hint == "see what else is on it with nvidia-smi, or try --gpu-memory 0=5529MiB"
    elif status == "warn":
        assert check.finding == "cuda:0, H100, has 1.9 GiB of 8 GiB free"
        assert "leave it out of --gpu-memory" in (check.hint or "")


def test_another_makers_gpu_needs_no_nvidia_driver() -> None:
    torch = torch_answer()["torch"] | {"build": "XPU 20250302"}
    check = check_gpus(torch_answer(torch=torch, devices={"found": [device(device="xpu:0", name="Arc B580")]}), {})
    assert check.status == "ok"
    assert check.finding.startswith("xpu:0 Arc B580")


BROKEN = {"error": "RuntimeError: The NVIDIA driver on your system is too old"}


@pytest.mark.parametrize(
    ("answer", "finding", "hint"),
    [
        (torch_answer(driver=driver(GIB)), "torch is a CPU build", "install a CUDA build of torch"),
        (torch_answer(torch=cuda_torch()), "there is no NVIDIA driver", "--gpus all"),
        (
            gpu_answer(device(), devices=BROKEN),
            "torch cannot use the GPU: RuntimeError: The NVIDIA",
            "update the driver",
        ),
        (gpu_answer(device(), devices={"found": []}), "shows 1 GPU, and torch, built for CUDA 12.8, 0", "update"),
        (
            gpu_answer(driver=driver() | {"too_old": "the NVIDIA driver is too old"}),
            "driver is too old",
            "an older CUDA",
        ),
        (gpu_answer(driver=driver(), devices=BROKEN), "shows no GPU", "CUDA_VISIBLE_DEVICES"),
        (torch_answer(driver={"error": "ImportError: pynvml"}), "driver failed: ImportError: pynvml", "nvidia-smi"),
        (torch_answer(driver=driver(GIB), torch={"error": "no"}), "torch does not work", "fix torch first"),
        (gpu_answer(device(error="RuntimeError: no kernel image")), "no kernel image", "a build of torch for this GPU"),
        (gpu_answer(device(), device(1, free_bytes=GIB // 2)), "cuda:1, H100, has 512 MiB of 80 GiB", "nvidia-smi"),
    ],
)
def test_what_does_not_fit_is_a_warning(answer: dict[str, Any], finding: str, hint: str) -> None:
    check = check_gpus(answer, {})
    assert (check.status, check.exit_code) == ("warn", 0)
    assert finding in check.finding
    assert hint in (check.hint or "")


def test_a_device_that_broke_early_has_only_its_number() -> None:
    check = check_gpus(torch_answer(torch=cuda_torch(), driver=driver(GIB), devices={"found": [
        {"device": "cuda:0", "error": "RuntimeError: out of memory"}
    ]}), {})  # fmt: skip
    assert check.status == "warn"
    assert check.finding == "cuda:0, a GPU, does not work: RuntimeError: out of memory"


def test_a_gpu_that_is_asked_for_and_not_there_fails() -> None:
    check = check_gpus(torch_answer(), {0: GIB})
    assert (check.status, check.exit_code) == ("fail", 2)
    assert check.finding == "gpu:0 is asked for, and torch finds 0 GPUs"
    assert check.hint == "correct the GPU's number; or do without: --gpu-memory 0"
    check = check_gpus(torch_answer(driver=driver(GIB)), {0: GIB})
    assert (check.status, check.exit_code) == ("fail", 2)
    assert "CPU build" in check.finding
    check = check_gpus(gpu_answer(device(), device(1, error="RuntimeError: no kernel image")), {0: GIB, 1: GIB})
    assert (check.status, check.exit_code) == ("fail", 2)
    assert "cuda:1, H100, does not work: RuntimeError: no kernel image" in check.finding
    check = check_gpus(gpu_answer(device()), {0: GIB, 3: GIB})
    assert "gpu:3 is asked for, and torch finds 1 GPU" in check.finding


def test_what_does_not_work_comes_before_what_is_full() -> None:
    check = check_gpus(
        gpu_answer(device(free_bytes=GIB // 2), device(1, error="RuntimeError: no kernel image")), {1: GIB}
    )
    assert (check.status, check.exit_code) == ("fail", 2)
    assert "cuda:1, H100, does not work" in check.finding
