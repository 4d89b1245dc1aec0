"""On a real GPU, by whoever has one: `pytest -m gpu -s`. It has not been run on one yet.

With `-m slow` each test runs on fake GPUs too, so that what is written here is known to run.

The tokens of plain transformers on the same GPU, the promise of `--gpu-memory`, packed experts by bitsandbytes'
kernels, memory that is full, and a table of times.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import SwitchTransformersForConditionalGeneration

import switchrun
from switchrun import GenerationOptions, Session, plan
from switchrun.errors import BudgetError
from switchrun.experts import accelerator
from switchrun.units import GIB, MIB, format_bytes
from tests.model.test_packed import unpacked
from tests.model.test_same_tokens import TEXTS, check_ids
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.fake_accelerator import fake_gpus
from tests.support.gpu_sessions import open_on_gpus
from tests.support.sessions import encode, oracle_for, small_process

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

DEMO = Path(switchrun.__file__).parent / "demo"
DEMO_TEXTS = (
    "A <extra_id_0> walks into a bar a orders a <extra_id_1> with <extra_id_2> pinch of <extra_id_3>.",
    "The cat sat on the <extra_id_0>.",
    "She gave him a <extra_id_0> of bread.",
)
ON_GPU: dict[str, Any] = {"": 0}
SPLIT: dict[str, Any] = {"": 0, "encoder": "cpu", "decoder.block.0": "disk"}
LAYERS = 4
#: A real GPU gets larger experts.
WIDTH, SPARED = (512, 16 * MIB) if accelerator.device_count() else (256, 4 * MIB)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, on a real GPU with experts of 8 MiB in float32, so that copies take a while."""
    folder = tmp_path_factory.mktemp("gpu") / "model"
    config = tiny_config(
        d_model=WIDTH, d_ff=4 * WIDTH, num_heads=8, d_kv=WIDTH // 8, num_experts=8,
        num_layers=LAYERS, num_decoder_layers=LAYERS,
        num_sparse_encoder_layers=LAYERS // 2, num_sparse_decoder_layers=LAYERS // 2, n_positions=128,
    )  # fmt: skip
    save_checkpoint(random_model(config), folder)
    return save_tiny_tokenizer(folder)


@pytest.fixture(
    autouse=True, params=[pytest.param("real", marks=pytest.mark.gpu), pytest.param("fake", marks=pytest.mark.slow)]
)
def machine(request: pytest.FixtureRequest) -> Iterator[str]:
    """The machine's GPUs (`real`) or two fake ones (`fake`); no test finds the memory of the one before."""
    if request.param == "real":
        if not accelerator.device_count():
            pytest.skip("torch finds no GPU")
        yield "real"
        accelerator.release_unused()
        return
    # Without it, a module that changes its dtype, as plain transformers' router does, leaves a fake tensor's inner one.
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    with fake_gpus(GIB, GIB):
        yield "fake"
    torch.__future__.set_swap_module_params_on_conversion(before)


def on_gpu(model: Any, dtype: str) -> Any:
    """Give plain transformers on the first GPU."""
    return oracle_for(model, dtype).to(accelerator.device(0))


def load(folder: Path) -> Any:
    return SwitchTransformersForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("device_map", [ON_GPU, SPLIT], ids=["gpu", "split"])
@pytest.mark.parametrize("slots", [(1, 1), (2, 3), (64, None)], ids=str)
def test_tokens(
    machine: str, folder: Path, dtype: str, device_map: dict[str, Any], slots: tuple[int, int | None]
) -> None:
    oracle = on_gpu(load(folder), dtype)
    with open_on_gpus(folder, device_map, *slots, dtype=dtype, batch_size=3) as session:
        for _ in range(3 if machine == "real" else 1):  # the cache is warmer each time
            check_ids(oracle, session, TEXTS, dtype)
            check_ids(oracle, session, TEXTS[:1], dtype)
        counters = session.engine.tiers.counters()["gpu:0"]
        assert counters.requests - counters.hits == counters.loads > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_tokens_of_the_demo_model(dtype: str) -> None:
    oracle = on_gpu(load(DEMO), dtype)
    with Session.open(DEMO, dtype=dtype, gpu_memory="1GiB", cpu_memory="8GiB", batch_size=3) as session:
        assert session.plan.gpus == (0,)
        check_ids(oracle, session, DEMO_TEXTS, dtype)


def test_tokens_of_two_gpus(folder: Path) -> None:
    if accelerator.device_count() < 2:
        pytest.skip("torch finds one GPU")
    oracle = on_gpu(load(folder), "fp32")
    with open_on_gpus(folder, {"": 0, "decoder": 1, "encoder.block.3": 1}, 3, 4, dtype="fp32", batch_size=3) as session:
        check_ids(oracle, session, TEXTS, "fp32")
        assert set(session.engine.tiers.gpus) == {0, 1}


def test_nf4_has_the_tokens_of_what_it_stands_for(folder: Path, tmp_path: Path) -> None:
    oracle = on_gpu(unpacked(load(folder), "nf4"), "fp32")
    with open_on_gpus(folder, ON_GPU, 3, 4, dtype="nf4", batch_size=3, offload_folder=tmp_path) as session:
        check_ids(oracle, session, TEXTS, "fp32")


@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_int8_is_near_to_what_it_stands_for(folder: Path, tmp_path: Path, stored: str) -> None:
    """LLM.int8 quantises activations too, so tokens may differ; its logits may be a few percent off."""
    model = load(folder)
    if stored == "bf16":
        folder = save_tiny_tokenizer(save_checkpoint(model, tmp_path / "bf16", dtype=torch.bfloat16))
    oracle = on_gpu(unpacked(model, "int8"), "fp32")
    with open_on_gpus(folder, ON_GPU, 3, 4, dtype="int8", batch_size=3, offload_folder=tmp_path / "o") as session:
        ids, mask = (tensor.to(accelerator.device(0)) for tensor in encode(session, TEXTS))
        with torch.no_grad():
            ours = session.engine.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            there = {"input_ids": ids.to(oracle.device), "attention_mask": mask.to(oracle.device)}
            theirs = oracle.encoder(**there).last_hidden_state.cpu()
        real, ours = mask.cpu().bool(), ours.cpu()
        error = (ours - theirs)[real].norm(dim=-1) / theirs[real].norm(dim=-1)
        assert error.median().item() < 0.1


def test_copies_leave_from_page_locked_memory(folder: Path) -> None:
    if accelerator.device_type() != "cuda":
        pytest.skip("memory is page-locked for CUDA only")
    with open_on_gpus(folder, ON_GPU, 2, 4, batch_size=3) as session:
        session.fill(TEXTS)
        locks = session.engine.tiers._locks
        assert locks is not None
        assert not locks._refused
        assert 0 < len(locks._locked) <= 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "nf4"])
def test_the_peak_is_within_the_budget(folder: Path, tmp_path: Path, dtype: str) -> None:
    settings: dict[str, Any] = {"dtype": dtype, "cpu_memory": "16GiB", "batch_size": 3}
    whole = plan(folder, gpu_memory="1TiB", output_tokens=16, **settings).tier("gpu:0").total_bytes
    accelerator.module().reset_peak_memory_stats(accelerator.device(0))
    with Session.open(
        folder, gpu_memory=whole - SPARED, offload_folder=tmp_path, max_new_tokens=16, **settings
    ) as session:
        use = session.plan.tier("gpu:0")
        session.fill(["<extra_id_0> " + "the cat sat on the mat . " * 14] * 3, GenerationOptions(max_new_tokens=16))
        assert accelerator.peak_bytes(0) <= use.total_bytes
        assert session.engine.tiers.gpus[0].num_slots == use.expert_slots


def test_memory_that_is_full(folder: Path) -> None:
    accelerator.wake(0)
    _, free = accelerator.memory_in_use(0)
    hog = torch.empty(free - 24 * MIB, dtype=torch.uint8, device=accelerator.device(0))
    with pytest.raises(BudgetError, match=r"gpu:0 is out of memory: .* \(try --gpu-memory"):
        open_on_gpus(folder, ON_GPU, 16, batch_size=3)
    del hog


def test_a_table_of_times(machine: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is asserted of the times: they are to be read."""
    lines = ["dtype  tiers         slots  first fill s  next fill s  ms/token  on GPU  copied      GPU peak"]
    for dtype in ("fp32", "bf16", "int8", "nf4") if machine == "real" else ("bf16", "nf4"):
        for name, device_map, slots in (("gpu", ON_GPU, 64), ("gpu", ON_GPU, 4), ("gpu+cpu+disk", SPLIT, 4)):
            accelerator.release_unused()
            accelerator.module().reset_peak_memory_stats(accelerator.device(0))
            with open_on_gpus(folder, device_map, slots, dtype=dtype, offload_folder=tmp_path) as session:
                seconds = []
                for _ in range(3 if machine == "real" else 1):
                    start = time.perf_counter()
                    (result,) = session.fill(TEXTS[:1], GenerationOptions(max_new_tokens=16))
                    seconds.append(time.perf_counter() - start)
                level = result.experts.tiers[0]
                lines.append(
                    f"{dtype:5}  {name:12}  {slots:5}  {seconds[0]:12.3f}  {seconds[-1]:11.3f}  "
                    f"{1000 * (result.timing.itl_seconds or 0):8.2f}  {level.hit_rate or 0:6.0%}  "
                    f"{format_bytes(level.load_bytes):10}  {format_bytes(accelerator.peak_bytes(0))}"
                )
                assert level.requests > 0
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(lines) + "\n")
