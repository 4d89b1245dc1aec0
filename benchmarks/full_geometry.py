"""Make a checkpoint of switch-c-2048's full geometry, 3.14 TB as `ls` sees it, on a disk with a few GB free.

    python benchmarks/full_geometry.py /path/to/folder --container torch

Names, shapes, shards and the mistakes of config.json are the Hub's. Dense weights are real random bytes, experts are
holes in sparse files: they read as zeros and cost no disk time. So this shows that the geometry works, how long opening
and planning take and how much memory is needed; it says nothing about the speed of reading experts.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from switchrun.checkpoint.torch_file import read_torch

D_MODEL, D_FF, D_KV, HEADS, LAYERS, VOCAB = 2080, 6144, 64, 30, 15, 32128
SHARD_BYTES = 9_990_000_000

#: As on the Hub, wrong number of decoder layers and absent keys included (https://huggingface.co/google/switch-c-2048).
HUB_CONFIG = {
    "d_ff": D_FF,
    "d_kv": D_KV,
    "d_model": D_MODEL,
    "decoder_start_token_id": 0,
    "dense_act_fn": "relu",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "expert_capacity": 64,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_full_sparse": True,
    "is_gated_act": False,
    "layer_norm_epsilon": 1e-06,
    "model_type": "switch_transformers",
    "num_decoder_layers": 12,
    "num_heads": HEADS,
    "num_layers": LAYERS,
    "num_sparse_decoder_layers": LAYERS,
    "num_sparse_encoder_layers": LAYERS,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "router_bias": False,
    "router_dtype": "float32",
    "router_jitter_noise": 0.01,
    "use_cache": True,
    "vocab_size": VOCAB,
}

Shapes = dict[str, tuple[int, ...]]


def dense_shapes(num_experts: int) -> Shapes:
    """Give names and shapes of everything that is not an expert."""
    shapes: Shapes = {"shared.weight": (VOCAB, D_MODEL), "decoder.lm_head.weight": (VOCAB, D_MODEL)}
    inner = HEADS * D_KV
    for stack, attentions in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        for block in range(LAYERS):
            for layer, attention in enumerate(attentions):
                prefix = f"{stack}.block.{block}.layer.{layer}"
                for matrix in "qkv":
                    shapes[f"{prefix}.{attention}.{matrix}.weight"] = (inner, D_MODEL)
                shapes[f"{prefix}.{attention}.o.weight"] = (D_MODEL, inner)
                shapes[f"{prefix}.layer_norm.weight"] = (D_MODEL,)
            prefix = f"{stack}.block.{block}.layer.{len(attentions)}"
            shapes[f"{prefix}.mlp.router.classifier.weight"] = (num_experts, D_MODEL)
            shapes[f"{prefix}.layer_norm.weight"] = (D_MODEL,)
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, HEADS)
        shapes[f"{stack}.final_layer_norm.weight"] = (D_MODEL,)
    return shapes


def expert_shapes(num_experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Give names and shapes of the experts in the Hub's order: a layer's `wi` of all experts, then its `wo`."""
    for stack, layer in (("encoder", 1), ("decoder", 2)):
        for block in range(LAYERS):
            for matrix, shape in (("wi", (D_FF, D_MODEL)), ("wo", (D_MODEL, D_FF))):
                for expert in range(num_experts):
                    prefix = f"{stack}.block.{block}.layer.{layer}.mlp.experts.expert_{expert}"
                    yield f"{prefix}.{matrix}.weight", shape


def split(num_experts: int) -> list[Shapes]:
    """Divide all tensors into shards of at most `SHARD_BYTES`; a new matrix of a layer begins a new shard."""
    shards = [dense_shapes(num_experts)]
    size, previous = SHARD_BYTES, ""
    for name, shape in expert_shapes(num_experts):
        nbytes = shape[0] * shape[1] * 2
        stacked = name.partition(".mlp.experts.")[0] + name[-9:]
        if size + nbytes > SHARD_BYTES or stacked != previous:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size, previous = size + nbytes, stacked
    return shards


def write_safetensors(path: Path, shapes: Shapes) -> dict[str, int]:
    """Write a header and a hole; give the offset of every tensor."""
    header: dict[str, object] = {}
    cursor = 0
    for name, shape in shapes.items():
        nbytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [cursor, cursor + nbytes]}
        cursor += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + cursor)
    offsets, cursor = {}, 8 + len(text)
    for name, shape in shapes.items():
        offsets[name] = cursor
        cursor += 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
    return offsets


def write_torch(path: Path, shapes: Shapes) -> dict[str, int]:
    """Write what `torch.save` writes, with holes for the data; give the offset of every tensor."""
    with FakeTensorMode():
        fakes = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(fakes, path)
    return {name: row.offset for name, row in read_torch(path).items()}


def write_dense(path: Path, shapes: Shapes, offsets: dict[str, int]) -> None:
    """Fill the dense weights with random numbers of a size that keeps the forward pass finite."""
    generator = torch.Generator().manual_seed(0)
    with open(path, "r+b") as file:
        for name, shape in shapes.items():
            weight = torch.empty(shape, dtype=torch.float32)
            if "layer_norm" in name:
                weight.fill_(1.0)
            else:
                weight.normal_(0, 1.0 if "shared" in name else D_MODEL**-0.5, generator=generator)
            os.pwrite(file.fileno(), weight.to(torch.bfloat16).view(torch.uint8).numpy().tobytes(), offsets[name])


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--container", choices=["torch", "safetensors"], default="torch")
    parser.add_argument("--experts", type=int, default=2048, help="experts in each layer")
    arguments = parser.parse_args()

    start = time.perf_counter()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    stem, suffix, write = {
        "torch": ("pytorch_model", ".bin", write_torch),
        "safetensors": ("model", ".safetensors", write_safetensors),
    }[arguments.container]
    shards = split(arguments.experts)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        path = folder / f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}"
        offsets = write(path, shapes)
        weight_map |= dict.fromkeys(shapes, path.name)
        if number == 1:
            write_dense(path, shapes, offsets)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**HUB_CONFIG, "num_experts": arguments.experts}, indent=2))
    apparent = sum(file.stat().st_size for file in folder.iterdir())
    real = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    print(
        f"{len(shards)} shards, {len(weight_map)} tensors, {apparent / 1e12:.3f} TB as seen, "
        f"{real / 1e9:.2f} GB on disk, made in {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
