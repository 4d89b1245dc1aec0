"""What Switch checkpoints call their tensors, and which of them a model needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from switchrun.checkpoint.types import Stack

STACKS: tuple[Stack, Stack] = ("encoder", "decoder")
SHARED = "shared.weight"
HEAD = "lm_head.weight"
#: What the conversion from T5X calls an untied head.
DECODER_HEAD = "decoder.lm_head.weight"
EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

# No leading zeros and not too many digits: `expert_007` is nobody's name for expert 7.
_NUMBER = r"(0|[1-9]\d{0,5})"
EXPERT_NAME = re.compile(
    rf"(encoder|decoder)\.block\.{_NUMBER}\.layer\.([12])\.mlp\.experts\.expert_{_NUMBER}\.(?:wi|wo)\.weight", re.ASCII
)
#: The weights of linear layers outside the experts: those that transformers may have saved in 8 bit.
LINEAR_NAME = re.compile(
    r".*\.(?:SelfAttention|EncDecAttention)\.[qkvo]\.weight|.*\.mlp\.(?:w[io]|router\.classifier)\.weight"
    r"|(?:decoder\.)?lm_head\.weight",
    re.ASCII,
)
GATED_NAME = re.compile(r"\.mlp\.experts\.expert_\d+\.wi_[01]\.(?:weight|w_comp)")
BLOCK_NAME = re.compile(rf"(encoder|decoder)\.block\.{_NUMBER}\.", re.ASCII)
ROUTER_NAME = re.compile(
    rf"(encoder|decoder)\.block\.{_NUMBER}\.layer\.([12])\.mlp\.router\.classifier\.weight", re.ASCII
)


def scales_of(weight: str) -> str:
    """Return the name of the scales that belong to a weight in int8, as bitsandbytes has it."""
    return f"{weight.removesuffix('.weight')}.SCB"


def mlp_layer(stack: Stack) -> int:
    """Return the number of a block's MLP layer: after self-attention, and in the decoder cross-attention."""
    return 1 if stack == "encoder" else 2


def mlp_prefix(stack: Stack, block: int) -> str:
    """Return the canonical name of a block's MLP: `encoder.block.3.layer.1.mlp`."""
    return f"{stack}.block.{block}.layer.{mlp_layer(stack)}.mlp"


def expert_prefix(stack: Stack, block: int, expert: int) -> str:
    """Return the canonical name of an expert: `encoder.block.3.layer.1.mlp.experts.expert_17`."""
    return f"{mlp_prefix(stack, block)}.experts.expert_{expert}"


def dense_tensors(
    config: Mapping[str, Any], sparse_blocks: Mapping[Stack, Sequence[int]], tied: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the canonical name and shape of every tensor that is not an expert's, in the model's order.

    `config` is repaired; `tied` is whether the head is the shared embedding.
    """
    d_model, d_ff, experts = config["d_model"], config["d_ff"], config["num_experts"]
    inner = config["num_heads"] * config["d_kv"]
    yield SHARED, (config["vocab_size"], d_model)
    for stack, blocks in zip(STACKS, (config["num_layers"], config["num_decoder_layers"]), strict=True):
        attention = {"layer.0": "SelfAttention"} | ({"layer.1": "EncDecAttention"} if stack == "decoder" else {})
        sparse = set(sparse_blocks[stack])
        for block in range(blocks):
            for layer, name in attention.items():
                prefix = f"{stack}.block.{block}.{layer}"
                for matrix in "qkv":
                    yield f"{prefix}.{name}.{matrix}.weight", (inner, d_model)
                yield f"{prefix}.{name}.o.weight", (d_model, inner)
                if block == 0 and name == "SelfAttention":
                    buckets = config["relative_attention_num_buckets"]
                    yield f"{prefix}.{name}.relative_attention_bias.weight", (buckets, config["num_heads"])
                yield f"{prefix}.layer_norm.weight", (d_model,)
            mlp = mlp_prefix(stack, block)
            if block in sparse:
                yield f"{mlp}.router.classifier.weight", (experts, d_model)
                if config["router_bias"]:
                    yield f"{mlp}.router.classifier.bias", (experts,)
            else:
                yield f"{mlp}.wi.weight", (d_ff, d_model)
                yield f"{mlp}.wo.weight", (d_model, d_ff)
            yield mlp.removesuffix("mlp") + "layer_norm.weight", (d_model,)
        yield f"{stack}.final_layer_norm.weight", (d_model,)
    if not tied:
        yield HEAD, (config["vocab_size"], d_model)
