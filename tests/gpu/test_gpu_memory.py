"""A GPU's memory runs out: once more with fewer slots, then exit code 6 with a smaller budget to try."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from switchrun import GenerationOptions, Session
from switchrun.errors import BudgetError
from switchrun.experts.accelerator import is_out_of_memory
from tests.model.test_same_tokens import TEXTS
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.fake_accelerator import fake_gpus
from tests.support.gpu_sessions import open_on_gpus
from tests.support.sessions import small_process

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

SLOTS = 8
OPTIONS = GenerationOptions(max_new_tokens=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # Experts of this size outweigh the activations of a short text.
    save_checkpoint(random_model(tiny_config(d_ff=2048)), tmp_path / "model")
    save_tiny_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def fill(session: Session) -> list[tuple[int, ...]]:
    return [result.output_ids for result in session.fill(TEXTS[:1], OPTIONS)]


def peaks(folder: Path) -> tuple[int, int, list[Any]]:
    """Give what opening and a fill take at their peaks without a limit, and the tokens."""
    with fake_gpus(None) as (gpu,), open_on_gpus(folder, {"": 0}, SLOTS) as session:
        opened, ids = gpu.peak, fill(session)
        return opened, gpu.peak, ids


def test_a_fill_is_done_again_with_half_of_the_slots(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened, filled, ids = peaks(folder)
    assert opened < filled
    caplog.set_level(logging.WARNING)
    capacity = (opened + filled) // 2
    with fake_gpus(capacity) as (gpu,), open_on_gpus(folder, {"": 0}, SLOTS) as session:
        before = session.stats().tiers[0]
        assert fill(session) == ids
        use = session.stats().tiers[0]
        assert (before.expert_slots, use.expert_slots) == (SLOTS, SLOTS // 2)
        assert use.expert_bytes == SLOTS // 2 * use.slot_bytes
        assert gpu.peak <= capacity
        assert fill(session) == ids
        assert session.engine.tiers.gpus[0].num_slots == SLOTS // 2
    (warning,) = caplog.messages
    assert warning.startswith("gpu:0 ran out of memory: it holds 4 experts from now on, not 8")


def test_a_fill_that_cannot_be_done_says_what_to_try(folder: Path) -> None:
    opened, *_ = peaks(folder)
    capacity = opened + 512
    with fake_gpus(capacity) as (gpu,), open_on_gpus(folder, {"": 0}, SLOTS) as session:
        slot = session.engine.tiers.gpus[0]._slots[0].nbytes
        hog = torch.empty(0, device="fakegpu:0")

        def take(*_: Any) -> None:  # another program takes what is given back
            nonlocal hog
            if gpu.allocated < capacity - slot:
                hog = torch.empty(capacity - gpu.allocated - 512, dtype=torch.uint8, device="fakegpu:0")

        session.engine.model.encoder.register_forward_pre_hook(take)
        with pytest.raises(BudgetError) as caught:
            fill(session)
        assert caught.value.exit_code == 6
        assert caught.value.message.startswith("gpu:0 is out of memory: of the 1 TiB that are allowed, switchrun has ")
        tried = re.fullmatch(r"try --gpu-memory 0=(\d+)MiB, or close other programs .*", caught.value.hint)
        assert tried is not None
        assert int(tried[1]) * 2**20 <= 0.9 * capacity


def test_opening_with_half_of_the_slots(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened, _, ids = peaks(folder)
    with fake_gpus(opened - 512), open_on_gpus(folder, {"": 0}, SLOTS) as session:
        assert session.plan.tier("gpu:0").expert_slots == SLOTS // 2
        assert fill(session) == ids
    assert "it holds 4 experts from now on, not 8" in caplog.text


@pytest.mark.parametrize("capacity", [512, 4096])
def test_opening_where_nothing_fits(folder: Path, capacity: int) -> None:
    with fake_gpus(capacity) as (gpu,):
        with pytest.raises(BudgetError, match=r"gpu:0 is out of memory: .* \(try --gpu-memory 0, or"):
            open_on_gpus(folder, {"": 0}, SLOTS)
        assert gpu.peak <= capacity


def test_opening_that_fails_gives_back_what_it_has_taken(folder: Path) -> None:
    opened, *_ = peaks(folder)
    with fake_gpus(None) as (gpu,):
        with open_on_gpus(folder, {"": 0}, 1) as session:
            slot = session.engine.tiers.gpus[0]._slots[0].nbytes
        gpu.capacity = opened - (SLOTS - 1) * slot - 512  # all weights, and no slot
        with pytest.raises(BudgetError) as caught:
            open_on_gpus(folder, {"": 0}, SLOTS)
        assert caught.value.__cause__ is not None  # whoever tries again may hold on to the error
        assert gpu.allocator.reserved == 0


def test_a_gpu_without_experts_says_what_to_try_too(folder: Path) -> None:
    device_map = {"": "cpu", "shared": 0, "lm_head": 0, "encoder.embed_tokens": 0, "decoder.embed_tokens": 0}
    with fake_gpus(None) as (gpu,), open_on_gpus(folder, device_map, SLOTS) as session:
        assert session.engine.tiers.gpus == {}
        ids, opened = fill(session), gpu.allocated
        assert gpu.peak > opened
    with fake_gpus(opened) as (gpu,), open_on_gpus(folder, device_map, SLOTS) as session:
        with pytest.raises(BudgetError, match=r"gpu:0 is out of memory: .* \(try --gpu-memory 0") as caught:
            fill(session)
        assert caught.value.exit_code == 6
        gpu.capacity = 1 << 40  # the other program is gone
        assert fill(session) == ids


def test_what_is_no_lack_of_gpu_memory_is_left_alone(folder: Path) -> None:
    with fake_gpus(None), open_on_gpus(folder, {"": 0}, SLOTS) as session:

        def fail(*_: Any) -> None:
            raise RuntimeError("something else")

        session.engine.model.encoder.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="something else"):
            fill(session)
        assert session.engine.tiers.gpus[0].num_slots == SLOTS


def test_how_libraries_say_it() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(MemoryError())
