"""Checkpoints that exist only as headers: the planner needs no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from switchrun.checkpoint.names import dense_tensors, mlp_prefix
from switchrun.checkpoint.types import ExpertKey, ExpertSlices, Stack, SwitchCheckpoint, TensorSlice
from switchrun.dtypes import STORED_ITEMSIZE

FILE = Path("/nowhere/model.safetensors")


def made_up_checkpoint(
    *,
    stored: str = "BF16",
    tied: bool = True,
    step: int = 2,
    layers: tuple[int, int] = (4, 4),
    **geometry: int,
) -> SwitchCheckpoint:
    """Make a checkpoint of headers alone, with experts in every `step`-th block."""
    config: dict[str, Any] = {
        "vocab_size": 3000, "d_model": 64, "d_kv": 16, "d_ff": 256, "num_heads": 4, "num_experts": 4,
        "expert_capacity": 64, "relative_attention_num_buckets": 8, "router_bias": False,
        "num_layers": layers[0], "num_decoder_layers": layers[1],
        "num_sparse_encoder_layers": layers[0] // step, "num_sparse_decoder_layers": layers[1] // step,
        "encoder_sparse_step": step, "decoder_sparse_step": step, "tie_word_embeddings": tied,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
    config |= geometry
    stacks: tuple[tuple[Stack, int], ...] = (("encoder", layers[0]), ("decoder", layers[1]))
    # As transformers counts: with step 2 blocks 1, 3, …; with step 1 all.
    sparse = {stack: tuple(b for b in range(blocks) if step == 1 or b % step == 1) for stack, blocks in stacks}
    offset = 0

    def tensor(shape: tuple[int, ...]) -> TensorSlice:
        nonlocal offset
        size = STORED_ITEMSIZE[stored]
        for length in shape:
            size *= length
        offset += size
        return TensorSlice(FILE, offset - size, size, stored, shape)

    d_model, d_ff = config["d_model"], config["d_ff"]
    dense = {name: tensor(shape) for name, shape in dense_tensors(config, sparse, tied)}
    experts = {
        ExpertKey(stack, block, expert): ExpertSlices(tensor((d_ff, d_model)), tensor((d_model, d_ff)))
        for stack, blocks in sparse.items()
        for block in blocks
        for expert in range(config["num_experts"])
    }
    return SwitchCheckpoint(
        id="made/up",
        revision=None,
        path=FILE.parent,
        config=config,
        repairs=(),
        dense=dense,
        experts=experts,
        sparse_blocks=sparse,
        fingerprint="",
        stored_dtype=stored,
        plain_dtype=stored,
        expert_forms=((next(iter(experts.values())), len(experts)),),
    )


def expert_tensors(checkpoint: SwitchCheckpoint) -> list[str]:
    """Give the names of all experts' tensors."""
    return [
        f"{mlp_prefix(key.stack, key.block)}.experts.expert_{key.expert}.{matrix}.weight"
        for key in checkpoint.experts
        for matrix in ("wi", "wo")
    ]


@st.composite
def checkpoints(draw: st.DrawFn) -> SwitchCheckpoint:
    """Small and middling geometries, up to some GiB."""
    step = draw(st.sampled_from([1, 2]))
    blocks = st.integers(1, 4).map(lambda n: n * step)
    return made_up_checkpoint(
        stored=draw(st.sampled_from(["F32", "F16", "BF16"])),
        tied=draw(st.booleans()),
        step=step,
        layers=(draw(blocks), draw(blocks)),
        d_model=draw(st.sampled_from([8, 64, 1024])),
        d_ff=draw(st.sampled_from([16, 256, 4096])),
        num_experts=draw(st.integers(1, 8)),
        vocab_size=draw(st.sampled_from([100, 32128])),
    )
