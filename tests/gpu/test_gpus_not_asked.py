"""A run that uses no GPU, or not all of them, leaves the others and their driver alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from switchrun import GenerationOptions, Session, plan
from switchrun.errors import UsageError
from switchrun.experts import accelerator
from switchrun.machine import gpus
from tests.model.test_same_tokens import TEXTS, saved
from tests.support.fake_accelerator import GPUS, fake_gpus
from tests.support.gpu_sessions import open_on_gpus
from tests.support.sessions import small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

SAMPLED = GenerationOptions(max_new_tokens=4, sample=True)


@pytest.mark.parametrize(
    "options",
    [
        {"gpu_memory": 0},
        {"gpu_memory": "0"},
        {"gpu_memory": "0=0"},
        {"device_map": {"": "cpu", "encoder": "disk"}},
    ],
    ids=str,
)
def test_without_a_gpu_in_the_plan_none_is_asked(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any) -> Any:
        raise AssertionError("asked")

    for module, name in [
        *((gpus, name) for name in ("torch_cuda", "visible_gpus", "_load_cuda", "_nvml")),
        *((accelerator, name) for name in ("device_type", "device_count", "module")),
        *((GPUS, name) for name in ("device_count", "get_rng_state", "mem_get_info", "empty_cache", "current_stream")),
    ]:
        monkeypatch.setattr(module, name, asked)
    saved(CheckpointSpec(), tmp_path)
    with fake_gpus(None), Session.open(tmp_path, cpu_memory="4GiB", **options) as session:
        (result,) = session.fill(TEXTS[:1], SAMPLED)
        assert result.memory.peak_gpu_bytes is session.stats().memory.peak_gpu_bytes is None
    with pytest.raises(AssertionError, match="asked"):
        plan(tmp_path)


def test_only_gpus_in_use_are_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(CheckpointSpec(), tmp_path)
    numbers: list[int] = []
    monkeypatch.setattr(GPUS, "max_memory_allocated", lambda place: numbers.append(place.index) or 7)
    monkeypatch.setattr(GPUS, "get_rng_state", lambda number: numbers.append(number))
    monkeypatch.setattr(GPUS, "set_rng_state", lambda state, number: numbers.append(number))
    with fake_gpus(None, None, None), open_on_gpus(tmp_path, {"": "cpu", "decoder": 1}, 2) as session:
        (result,) = session.fill(TEXTS[:1], SAMPLED)
    assert result.memory.peak_gpu_bytes == 7
    assert set(numbers) == {1}


@pytest.mark.parametrize("why", ["The NVIDIA driver on your system is too old", "No CUDA GPUs are available"])
def test_cuda_that_does_not_come_up_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    def unavailable() -> bool:
        warnings.warn(f"CUDA initialization: {why}\nin three lines", UserWarning, stacklevel=1)
        return False

    def fail() -> None:
        raise RuntimeError(f"{why}\nand more")

    saved(CheckpointSpec(), tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    monkeypatch.setattr(torch.cuda, "init", fail)
    with pytest.raises(UsageError) as caught:
        Session.open(tmp_path, cpu_memory="4GiB", gpu_memory="1GiB")
    assert caught.value.message == f"torch, built for CUDA 12.8, cannot use the GPU: {why}"
    assert caught.value.hint == "give --gpu-memory 0, or see switchrun doctor"
