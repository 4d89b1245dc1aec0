"""Hypothesis strategies: which checkpoints there can be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import strategies as st
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from tests.support.checkpoints import random_model, save_checkpoint, tiny_config

#: Blocks of a stack, and how many of them have experts, by sparse step.
_LAYERS = {1: (2, 2), 2: (4, 2), 3: (3, 1)}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class CheckpointSpec:
    """All that a tiny checkpoint can differ in; see `save_checkpoint` and `tiny_config`."""

    container: str = "safetensors"
    sharded: bool = False
    dialect: str = "standard"
    dtype: str = "fp32"
    tied: bool = True
    encoder_step: int = 2
    decoder_step: int = 2
    capacity: int = 64
    experts: int = 4
    transposed: bool = False
    seed: int = 0

    def config(self) -> SwitchTransformersConfig:
        """The true configuration, whatever the dialect writes."""
        encoder, sparse_encoder = _LAYERS[self.encoder_step]
        decoder, sparse_decoder = _LAYERS[self.decoder_step]
        return tiny_config(
            num_layers=encoder,
            num_sparse_encoder_layers=sparse_encoder,
            num_decoder_layers=decoder,
            num_sparse_decoder_layers=sparse_decoder,
            num_experts=self.experts,
            expert_capacity=self.capacity,
            tie_word_embeddings=self.tied,
        )

    def model(self) -> SwitchTransformersForConditionalGeneration:
        """The model itself, in the stored dtype: the oracle."""
        own = self.dialect == "own-embeddings"
        return random_model(self.config(), self.seed, _DTYPES[self.dtype], own_embeddings=own)

    def save(self, model: SwitchTransformersForConditionalGeneration, folder: Path) -> Path:
        """Write the model as this spec says."""
        return save_checkpoint(
            model,
            folder,
            container=self.container,
            sharded=self.sharded,
            dialect=self.dialect,
            transposed=self.transposed,
        )


@st.composite
def checkpoint_specs(draw: st.DrawFn, max_experts: int = 64) -> CheckpointSpec:
    """Every combination that can exist."""
    container = draw(st.sampled_from(["safetensors", "torch", "torch-pt"]))
    sharded = container != "torch-pt" and draw(st.booleans())
    tied = draw(st.booleans())
    dialects = ["standard", "alias-embedding", "extra"]
    if tied:
        dialects.append("copied-head")
    else:
        dialects += ["hub-switch-c", "own-embeddings"]
    if container != "safetensors" and not sharded:
        dialects.append("nested")
    dialect = draw(st.sampled_from(dialects))
    steps = st.just(1) if dialect == "hub-switch-c" else st.sampled_from([1, 2, 3])
    return CheckpointSpec(
        container=container,
        sharded=sharded,
        dialect=dialect,
        dtype=draw(st.sampled_from(["fp32", "bf16", "fp16"])),
        tied=tied,
        encoder_step=draw(steps),
        decoder_step=draw(steps),
        capacity=draw(st.integers(1, 64)),
        experts=draw(st.integers(1, max_experts)),
        transposed=container != "safetensors" and draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )
