"""How far packed experts move the logits from float32's: no farther than bitsandbytes' LLM.int8 on the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import nn
from transformers import SwitchTransformersForConditionalGeneration

from switchrun import Session
from tests.model.test_packed import logits_of
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
        codes, stats, outliers = bnb.int8_vectorwise_quant(x.half(), threshold=6.0)
        result: torch.Tensor = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            x, codes, self.codes, stats, self.scb, outliers
        )[0]
        return result


def with_llm_int8(model: Any) -> Any:
    result = copy.deepcopy(model)
    for name, module in result.named_modules():
        if name.rpartition(".")[2].startswith("expert_"):
            module.wi, module.wo = LlmInt8(module.wi.weight), LlmInt8(module.wo.weight)
    return result


def errors(model: Any, session: Session, positions: Any = slice(None)) -> tuple[float, float]:
    """Give the relative error of the session's logits and of LLM.int8's, against plain float32."""
    reference = logits_of(model, session)[positions]
    ours = logits_of(session.engine.model, session)[positions]
    theirs = logits_of(with_llm_int8(model), session)[positions]
    return relative(ours, reference), relative(theirs, reference)


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    return ((result - reference).norm() / reference.norm()).item()


@pytest.mark.slow
def test_int8_on_the_demo_model(tmp_path: Path) -> None:
    with Session.open(dtype="int8", offload_folder=tmp_path / "tier") as session:
        model = SwitchTransformersForConditionalGeneration.from_pretrained(session.checkpoint.path).eval()
        if session.plan.compute_dtype == "bf16":
            # Everything else is in bfloat16 for all three: only the experts are compared.
            ours, theirs = errors(model.bfloat16(), session)
        else:
            ours, theirs = errors(model, session)
    print(f"demo: ours {ours:.5f}, LLM.int8 {theirs:.5f}")
    assert ours <= theirs


@pytest.mark.parametrize("seed", range(3))
def test_int8_on_random_checkpoints(tmp_path: Path, seed: int) -> None:
    """Of one expert a layer: else a token may go to another expert, and the error is that of routing."""
    model = random_model(tiny_config(num_experts=1, d_model=64, d_ff=160), seed)
    save_tiny_tokenizer(save_checkpoint(model, tmp_path / "model"))
    with Session.open(tmp_path / "model", dtype="int8", batch_size=3, offload_folder=tmp_path / "tier") as session:
        ours, theirs = errors(model, session)
    print(f"random: ours {ours:.5f}, LLM.int8 {theirs:.5f}")
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
