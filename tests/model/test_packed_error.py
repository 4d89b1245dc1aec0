"""How far packed experts move the logits from float32's: no farther than bitsandbytes' LLM.int8 on the same weights."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn
from transformers import SwitchTransformersForConditionalGeneration

from switchrun import Session
from switchrun.checkpoint import open_checkpoint
from tests.model.test_packed import is_dense_linear, logits_of
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.sessions import small_process

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")


class LlmInt8(nn.Module):
    """What `Linear8bitLt` computes with its threshold of 6.0, by the functional operations."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = None  # transformers asks for its dtype
        self.codes, self.scb, _ = bnb.int8_vectorwise_quant(weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        codes, stats, outliers = bnb.int8_vectorwise_quant(tokens.half(), threshold=6.0)
        result: torch.Tensor = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            tokens, codes, self.codes, stats, self.scb, outliers
        )[0]
        return result.view(*x.shape[:-1], -1)


def with_llm_int8(model: Any) -> Any:
    """Give the model with bitsandbytes' LLM.int8 for the experts and the linear layers outside them."""
    result = copy.deepcopy(model)
    for name, module in list(result.named_modules()):
        if (".expert_" in name and isinstance(module, nn.Linear)) or is_dense_linear(name):
            result.set_submodule(name, LlmInt8(module.weight))
    return result


def errors(model: Any, session: Session) -> tuple[float, float]:
    """Give the relative error of the session's logits and of LLM.int8's, against plain float32."""
    reference = logits_of(model, session)
    ours = logits_of(session.engine.model, session)
    theirs = logits_of(with_llm_int8(model), session)
    return relative(ours, reference), relative(theirs, reference)


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    return ((result - reference).norm() / reference.norm()).item()


@pytest.fixture
def demo(tmp_path: Path) -> tuple[Any, Path]:
    """Give the demo model, and a copy of it stored in float32: else everything but the experts is in bfloat16."""
    there = open_checkpoint().path
    model = SwitchTransformersForConditionalGeneration.from_pretrained(there, dtype=torch.float32).eval()
    folder = tmp_path / "demo"
    shutil.copytree(there, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_checkpoint(model, folder)
    return model, folder


def test_int8_on_the_demo_model(tmp_path: Path, demo: tuple[Any, Path]) -> None:
    model, folder = demo
    with Session.open(folder, dtype="int8", batch_size=3, offload_folder=tmp_path / "tier") as session:
        assert session.plan.precision.compute == "fp32"
        ours, theirs = errors(model, session)
    assert ours <= theirs


def test_int8_on_the_demo_model_in_bfloat16(tmp_path: Path, demo: tuple[Any, Path]) -> None:
    """All three are as far from float32 as bfloat16's own rounding is: int8 is lost in it.

    The median counts: a token whose experts are nearly equal to the router may go to the other one.
    """
    model, _ = demo
    with Session.open(dtype="int8", batch_size=3, offload_folder=tmp_path / "tier") as session:
        assert session.plan.precision.compute == "bf16"
        reference = logits_of(model, session)
        rounded = copy.deepcopy(model).bfloat16()
        ours, theirs, plain = (
            ((logits_of(each, session).float() - reference).norm(dim=-1) / reference.norm(dim=-1)).median().item()
            for each in (session.engine.model, with_llm_int8(rounded), rounded)
        )
    assert ours <= 1.25 * max(theirs, plain)


@pytest.mark.parametrize("seed", range(3))
def test_int8_on_random_checkpoints(tmp_path: Path, seed: int) -> None:
    """Of one expert a layer: else a token may go to another expert, and the error is that of routing."""
    model = random_model(tiny_config(num_experts=1, d_model=64, d_ff=160), seed)
    save_tiny_tokenizer(save_checkpoint(model, tmp_path / "model"))
    with Session.open(tmp_path / "model", dtype="int8", batch_size=3, offload_folder=tmp_path / "tier") as session:
        ours, theirs = errors(model, session)
    assert ours <= theirs
    assert ours < 0.05


def test_nf4_costs_more_than_int8_and_not_much(tmp_path: Path) -> None:
    model = random_model(tiny_config(num_experts=1, d_model=64, d_ff=160))
    save_tiny_tokenizer(save_checkpoint(model, tmp_path / "model"))
    found = {}
    for dtype in ("int8", "nf4"):
        with Session.open(tmp_path / "model", dtype=dtype, batch_size=3, offload_folder=tmp_path / "tier") as session:
            found[dtype] = errors(model, session)[0]
    assert found["int8"] < found["nf4"] < 0.3
