"""The promise of `--gpu-memory`: what is allocated on a GPU, activations included, stays within its budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from switchrun import GenerationOptions, Session, plan
from switchrun.dtypes import Dtype, Precision
from switchrun.planning import memory
from switchrun.units import MIB
from tests.planning.made_up import made_up_checkpoint
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.fake_accelerator import fake_gpus
from tests.support.sessions import small_process

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

#: As long as the longest input may be.
LONG = "<extra_id_0> " + "the cat and the dog sat on the mat . " * 5
BATCH = 3
ON_DISK = {"": 0, "encoder": "disk", "decoder.block.2": "disk"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budget") / "model"
    config = tiny_config(
        d_model=64, d_ff=256, num_heads=4, d_kv=16, num_layers=4, num_sparse_encoder_layers=2, n_positions=64,
        num_decoder_layers=4, num_sparse_decoder_layers=2, num_experts=8,
    )  # fmt: skip
    save_checkpoint(random_model(config), folder)
    save_tiny_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("dtype", "device_map", "beams"),
    [
        ("bf16", None, 3),
        ("nf4", ON_DISK, 1),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in [
            ("fp32", None, 1), ("int8", None, 1), ("nf4", None, 1), ("bf16", ON_DISK, 1),
        ]),
    ],
    ids=str,
)  # fmt: skip
def test_the_peak_is_within_the_budget(
    folder: Path, dtype: str, beams: int, device_map: dict[str, Any] | None, tmp_path: Path
) -> None:
    # Room for some of the experts only.
    most = whole_total(folder, dtype, device_map, beams)
    budget = most - 4 * (MIB // 16)
    with fake_gpus(None) as (gpu,), open_within(folder, dtype, device_map, beams, budget, tmp_path) as session:
        use = session.plan.tier("gpu:0")
        assert 0 < use.expert_slots < session.plan.num_experts
        assert use.total_bytes <= budget
        options = GenerationOptions(max_new_tokens=16, num_beams=beams)
        results = session.fill([LONG] * BATCH, options)
        assert results[0].tokens.input >= 50
        # What is set aside for libraries is not used on this device, so it must not hide anything.
        assert gpu.peak <= use.total_bytes - memory.GPU_LIBRARY_BYTES
        assert results[0].memory.peak_gpu_bytes == gpu.peak
        assert session.engine.tiers.gpus[0].num_slots == use.expert_slots


@pytest.mark.parametrize("d_ff", [100, 900, 1024, 1500, 3000, 5000, 6500, 7000, 10238, 10240, 12000])
def test_slots_are_counted_as_torch_takes_them_from_the_driver(d_ff: int) -> None:
    checkpoint, precision = made_up_checkpoint(d_model=512, d_ff=d_ff), Precision(Dtype.BF16)
    size, counted = memory.gpu_expert_bytes(checkpoint, precision), memory.gpu_slot_bytes(checkpoint, precision)
    assert size == 2048 * d_ff
    slots: list[torch.Tensor] = []
    with fake_gpus(None) as (gpu,):
        for count in range(1, 41):
            slots.append(torch.empty(size, dtype=torch.uint8, device="fakegpu:0"))
            assert gpu.allocated <= count * counted
            # A block that is begun may be filled by something else.
            assert gpu.allocator.reserved < count * counted + 20 * MIB
        assert gpu.allocator.reserved >= 0.95 * 40 * counted - 2 * MIB  # nor is it counted twice
        slots.clear()


def open_within(
    folder: Path, dtype: str, device_map: dict[str, Any] | None, beams: int, budget: int, offload: Path
) -> Session:
    return Session.open(
        folder,
        dtype=dtype,
        gpu_memory=budget,
        cpu_memory="4GiB",
        device_map=device_map,
        batch_size=BATCH,
        num_beams=beams,
        max_new_tokens=16,
        offload_folder=offload,
    )


def whole_total(folder: Path, dtype: str, device_map: dict[str, Any] | None, beams: int) -> int:
    """Give what the plan takes on the GPU if it may take all."""
    whole = plan(
        folder, dtype=dtype, gpu_memory=1 << 40, cpu_memory="4GiB", device_map=device_map, batch_size=BATCH,
        num_beams=beams, output_tokens=16,
    )  # fmt: skip
    return whole.tier("gpu:0").total_bytes
