"""Models that transformers saved in 8 bit: opened as they are, read in place, the numbers those of our own int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, SwitchTransformersForConditionalGeneration

import switchrun
from switchrun import Session
from switchrun.checkpoint import open_checkpoint
from switchrun.errors import UsageError
from switchrun.kernels.int8 import quantise_int8
from tests.model.test_int8_linear import MAPS, open_at
from tests.model.test_packed import OPTIONS, TEXTS, check_logits, experts_in, fill, logits_of, saved, unpacked
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.int8 import save_in_int8
from tests.support.sessions import generate, open_with_slots, oracle_for, small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

#: Codes of a 32 × 16 and a 16 × 32 matrix, and float32 scales for their rows.
EXPERT_BYTES = 2 * 16 * 32 + 4 * (32 + 16)

Keep = Callable[[str], bool]


def routers(name: str) -> bool:
    """Plain routers: what transformers saves has them in int8, our own int8 never has."""
    return ".router." in name


def heads_too(name: str) -> bool:
    return routers(name) or "lm_head" in name


#: Which linear layers are stored plain.
MIXTURES: dict[str, Keep] = {
    "wo": lambda name: heads_too(name) or ".wo." in name,
    "experts of a block": lambda name: heads_too(name) or name.startswith("encoder.block.1.layer.1.mlp.experts"),
    "all experts": lambda name: heads_too(name) or ".experts." in name,
    "one expert": lambda name: heads_too(name) or ".expert_2." in name,
    "attention": lambda name: heads_too(name) or "Attention" in name,
    "the decoder": lambda name: heads_too(name) or name.startswith("decoder."),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("container", ["safetensors", "torch", "torch, transposed"])
@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16"])
def test_the_same_as_when_we_quantise(tmp_path: Path, container: str, stored: str) -> None:
    transposed = container == "torch, transposed"
    spec = CheckpointSpec(container=container.split(",")[0], dtype=stored, transposed=transposed, tied=False)
    saved(spec, tmp_path / "model")
    with open_at(tmp_path, "int8", {"": "cpu"}) as session:
        expected, reference = fill(session), logits_of(session.engine.model, session)
    save_in_int8(tmp_path / "model", heads_too)
    for slots in (1, 2, 5, None):
        with open_with_slots(tmp_path / "model", slots, batch_size=3, offload_folder=tmp_path / "own") as session:
            assert (session.plan.dtype, session.plan.stored_dtype) == ("int8", "I8")
            assert session.plan.precision.compute == ("bf16" if stored == "bf16" else "fp32")
            assert fill(session) == expected
            assert torch.equal(logits_of(session.engine.model, session), reference)
            experts = session.stats().experts
            headers = experts.load_bytes - experts.loads * EXPERT_BYTES
            assert (headers == 0) if container == "safetensors" else (0 < headers <= experts.loads * 4 * 256)
    assert not experts_in(tmp_path / "own")


@pytest.mark.parametrize(
    "kept",
    [pytest.param(kept, marks=() if kept in ("wo", "all experts") else pytest.mark.campaign) for kept in MIXTURES],
)
def test_any_mixture_of_plain_and_int8(tmp_path: Path, kept: str) -> None:
    saved(CheckpointSpec(tied=False), tmp_path / "model")
    with open_at(tmp_path, "int8", {"": "cpu"}) as session:
        expected, reference = fill(session), logits_of(session.engine.model, session)
    save_in_int8(tmp_path / "model", MIXTURES[kept])
    for device_map in MAPS:
        with Session.open(
            tmp_path / "model", batch_size=3, device_map=device_map, offload_folder=tmp_path / "own"
        ) as session:
            assert fill(session) == expected
            assert torch.equal(logits_of(session.engine.model, session), reference)
    for slots in (1, 3):
        with open_with_slots(tmp_path / "model", slots, batch_size=3, offload_folder=tmp_path / "own") as session:
            assert fill(session) == expected
    # Only where no expert is stored in int8 are they packed by us, and kept.
    assert bool(experts_in(tmp_path / "own")) == (kept == "all experts")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("device_map", MAPS)
def test_routers_and_a_head_in_int8(tmp_path: Path, tied: bool, device_map: Any) -> None:
    """A router in int8 is unpacked and computes in float32, as every router."""
    model = saved(CheckpointSpec(tied=tied), tmp_path / "model")
    save_in_int8(tmp_path / "model")
    oracle = oracle_for(dequantised(model), "fp32")
    with Session.open(
        tmp_path / "model", batch_size=3, device_map=device_map, offload_folder=tmp_path / "own"
    ) as session:
        assert fill(session) == generate(oracle, session, TEXTS, max_new_tokens=OPTIONS.max_new_tokens)
        check_logits(oracle, session)
        there = dict(session.engine.model.named_parameters())
        assert (session.engine.model.lm_head.weight.dtype == torch.int8) == (not tied)
    assert all(weight.dtype == torch.float32 for name, weight in there.items() if routers(name))
    assert not any(name.endswith("classifier.SCB") for name in there)


def dequantised(model: Any) -> Any:
    """Give a model whose linear layers, also routers and an untied head, are what their int8 form stands for."""
    result = unpacked(model, "int8")
    for name, module in result.named_modules():
        untied = name == "lm_head" and not model.config.tie_word_embeddings
        if name.endswith("router.classifier") or untied:
            weight = module.weight.data
            codes, scb = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
            quantise_int8(weight, codes, scb)
            module.weight = torch.nn.Parameter(codes * (scb / 127)[:, None])
    return result


def test_what_transformers_saves(tmp_path: Path) -> None:
    """With its own bitsandbytes integration. The answers are those of the weights that are in the file."""
    model = random_model(tiny_config(d_model=32, d_ff=64))
    save_checkpoint(model, tmp_path / "plain")
    quantised = SwitchTransformersForConditionalGeneration.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    quantised.save_pretrained(tmp_path / "model")
    save_tiny_tokenizer(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    oracle = oracle_for(model, "fp32")
    scales = {name.removesuffix("SCB") + "weight": scb for name, scb in stored.items() if name.endswith("SCB")}
    assert set(scales) == {name for name, weight in stored.items() if weight.dtype == torch.int8}
    for name, scb in scales.items():
        oracle.get_parameter(name).data = stored[name] * (scb / 127)[:, None]
    with Session.open(tmp_path / "model", batch_size=3, offload_folder=tmp_path / "own") as session:
        assert session.checkpoint.stored_dtype == "I8"
        check_logits(oracle, session)
        assert fill(session) == generate(oracle, session, TEXTS, max_new_tokens=OPTIONS.max_new_tokens)


def test_large_experts_are_read_past_the_page_cache(tmp_path: Path) -> None:
    """Two reads of whole pages, for the codes lie side by side in the file, and so do the scales."""
    config = tiny_config(d_model=1024, d_ff=2112, num_experts=2, num_layers=2, num_decoder_layers=2)
    save_tiny_tokenizer(save_checkpoint(random_model(config), tmp_path / "model"))
    with open_at(tmp_path, "int8", {"": "cpu"}) as session:
        reference = logits_of(session.engine.model, session)
    save_in_int8(tmp_path / "model", routers)
    stored = 2 * 1024 * 2112 + 4 * (1024 + 2112)
    with open_with_slots(tmp_path / "model", 1, batch_size=3, offload_folder=tmp_path / "own") as session:
        assert session.checkpoint.expert_bytes == stored >= 4 * 1024**2
        assert torch.equal(logits_of(session.engine.model, session), reference)
        experts = session.stats().experts
        assert 0 <= experts.load_bytes - experts.loads * stored <= experts.loads * 4 * 4096


def test_the_plan_has_the_bytes_that_are_stored_and_allocated(tmp_path: Path) -> None:
    saved(CheckpointSpec(tied=False), tmp_path / "model")
    save_in_int8(tmp_path / "model")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    plan = switchrun.plan(tmp_path / "model")
    layouts = 2 * len(checkpoint.experts) + sum(len(tensor.parts) for tensor in checkpoint.dense.values())
    header = int.from_bytes((tmp_path / "model" / "model.safetensors").read_bytes()[:8], "little")
    assert plan.total_bytes == (tmp_path / "model" / "model.safetensors").stat().st_size - 8 - header - layouts
    with Session.open(tmp_path / "model", offload_folder=tmp_path / "own") as session:
        resident = {weight.data_ptr(): weight.nbytes for weight in session.engine.model.parameters()}
        assert sum(resident.values()) == session.plan.tier("cpu").dense_bytes


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "nf4"])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: str) -> None:
    saved(CheckpointSpec(), tmp_path / "model")
    save_in_int8(tmp_path / "model")
    with pytest.raises(UsageError, match=f"stored in int8, so it cannot be had in {dtype}") as caught:
        switchrun.plan(tmp_path / "model", dtype=dtype)
    assert "leave out --dtype" in (caught.value.hint or "")
    assert switchrun.plan(tmp_path / "model", dtype="int8").dtype == "int8"
