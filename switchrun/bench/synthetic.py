"""Checkpoints of real geometries without their weights: sparse files of full size, to try a machine before a download.

Dense weights are real random bytes. Experts are holes, which read as zeros and cost no disk time, unless they are
materialised: then they are random bytes too, and reading them is real.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from switchrun.checkpoint.torch_file import read_torch
from switchrun.checkpoint.types import ExpertKey, Stack

Container = Literal["torch", "safetensors"]
Shapes = dict[str, tuple[int, ...]]

#: As large as the Hub's shards of switch-c-2048.
SHARD_BYTES = 9_990_000_000


@dataclass(frozen=True, slots=True)
class Geometry:
    """The measures of a Switch checkpoint stored in bf16; every MLP is sparse if `sparse_step` is 1."""

    d_model: int
    d_ff: int
    d_kv: int
    num_heads: int
    num_layers: int
    num_experts: int
    sparse_step: int = 1
    tied: bool = False
    vocab_size: int = 32128
    expert_capacity: int = 64
    #: Write the key names and the mistakes of config.json that google/switch-c-2048 has on the Hub.
    hub_faults: bool = False

    def sparse(self, block: int) -> bool:
        """Tell whether a block has experts, by transformers' rule."""
        return self.sparse_step == 1 or block % self.sparse_step == 1

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return 2 * 2 * self.d_model * self.d_ff

    def config(self) -> dict[str, Any]:
        """Give config.json."""
        sparse_layers = self.num_layers // self.sparse_step
        config: dict[str, Any] = {
            "d_ff": self.d_ff,
            "d_kv": self.d_kv,
            "d_model": self.d_model,
            "decoder_start_token_id": 0,
            "dense_act_fn": "relu",
            "dropout_rate": 0.1,
            "eos_token_id": 1,
            "expert_capacity": self.expert_capacity,
            "is_encoder_decoder": True,
            "is_gated_act": False,
            "layer_norm_epsilon": 1e-06,
            "model_type": "switch_transformers",
            "num_decoder_layers": self.num_layers,
            "num_experts": self.num_experts,
            "num_heads": self.num_heads,
            "num_layers": self.num_layers,
            "num_sparse_decoder_layers": sparse_layers,
            "num_sparse_encoder_layers": sparse_layers,
            "pad_token_id": 0,
            "relative_attention_max_distance": 128,
            "relative_attention_num_buckets": 32,
            "router_bias": False,
            "router_dtype": "float32",
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }
        if self.hub_faults:
            # https://huggingface.co/google/switch-c-2048: 12 is wrong, and tie_word_embeddings is absent.
            return config | {"num_decoder_layers": 12, "is_full_sparse": True}
        return config | {
            "tie_word_embeddings": self.tied,
            "architectures": ["SwitchTransformersForConditionalGeneration"],
            "dtype": "bfloat16",
        }


#: The checkpoints that Google published (FACTS: the Hub's own config files).
GEOMETRIES: Mapping[str, Geometry] = {
    "switch-c-2048": Geometry(2080, 6144, 64, 30, 15, 2048, hub_faults=True),
    "switch-large-128": Geometry(1024, 4096, 64, 16, 24, 128, sparse_step=2, tied=True),
    **{
        f"switch-base-{count}": Geometry(768, 3072, 64, 12, 12, count, sparse_step=2, tied=True)
        for count in (8, 16, 32, 64, 128, 256)
    },
}


def make_checkpoint(
    folder: Path,
    geometry: Geometry,
    container: Container = "safetensors",
    materialize: Callable[[ExpertKey], bool] | None = None,
    on_bytes: Callable[[int], None] | None = None,
    routed: int | None = None,
) -> int:
    """Write a synthetic checkpoint.

    Args:
        folder: Where; made if need be.
        geometry: Which.
        container: `torch` (as the Hub has switch-c-2048) or `safetensors`.
        materialize: Tells which experts get real bytes; None is none of them.
        on_bytes: Called with the number of real bytes after each write.
        routed: Routers choose among so many first experts of every layer, at least 2; None is among all.

    Returns:
        The number of tensors.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write = _write_torch if container == "torch" else _write_safetensors
    stem, suffix = ("pytorch_model", ".bin") if container == "torch" else ("model", ".safetensors")
    shards = list(_split(geometry))
    weight_map: dict[str, str] = {}
    fill = _Filler(geometry, on_bytes or (lambda _: None), routed)
    for number, shapes in enumerate(shards, 1):
        path = folder / f"{stem}-{number:05d}-of-{len(shards):05d}{suffix}"
        offsets = write(path, shapes)
        weight_map |= dict.fromkeys(shapes, path.name)
        wanted = [name for name in shapes if _wanted(name, materialize)]
        fill.write(path, {name: shapes[name] for name in wanted}, offsets)
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(geometry.config(), indent=2))
    return len(weight_map)


def _wanted(name: str, materialize: Callable[[ExpertKey], bool] | None) -> bool:
    if ".experts." not in name:
        return True
    if materialize is None:
        return False
    parts = name.split(".")
    stack: Stack = "encoder" if parts[0] == "encoder" else "decoder"
    return materialize(ExpertKey(stack, int(parts[2]), int(parts[-3].removeprefix("expert_"))))


def _dense_shapes(g: Geometry) -> Shapes:
    shapes: Shapes = {"shared.weight": (g.vocab_size, g.d_model)}
    if not g.tied:
        shapes["decoder.lm_head.weight" if g.hub_faults else "lm_head.weight"] = (g.vocab_size, g.d_model)
    inner = g.num_heads * g.d_kv
    for stack, attentions in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        for block in range(g.num_layers):
            for layer, attention in enumerate(attentions):
                prefix = f"{stack}.block.{block}.layer.{layer}"
                for matrix in "qkv":
                    shapes[f"{prefix}.{attention}.{matrix}.weight"] = (inner, g.d_model)
                shapes[f"{prefix}.{attention}.o.weight"] = (g.d_model, inner)
                shapes[f"{prefix}.layer_norm.weight"] = (g.d_model,)
            prefix = f"{stack}.block.{block}.layer.{len(attentions)}"
            if g.sparse(block):
                shapes[f"{prefix}.mlp.router.classifier.weight"] = (g.num_experts, g.d_model)
            else:
                shapes[f"{prefix}.mlp.wi.weight"] = (g.d_ff, g.d_model)
                shapes[f"{prefix}.mlp.wo.weight"] = (g.d_model, g.d_ff)
            shapes[f"{prefix}.layer_norm.weight"] = (g.d_model,)
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, g.num_heads)
        shapes[f"{stack}.final_layer_norm.weight"] = (g.d_model,)
    return shapes


def _split(g: Geometry) -> Iterator[Shapes]:
    """Divide tensors into shards as the Hub does: dense weights, then all `wi` of a layer, then its `wo`."""
    yield _dense_shapes(g)
    for stack, layer in (("encoder", 1), ("decoder", 2)):
        for block in filter(g.sparse, range(g.num_layers)):
            for matrix, shape in (("wi", (g.d_ff, g.d_model)), ("wo", (g.d_model, g.d_ff))):
                prefix = f"{stack}.block.{block}.layer.{layer}.mlp.experts"
                each = max(1, SHARD_BYTES // (g.expert_bytes // 2))
                for start in range(0, g.num_experts, each):
                    experts = range(start, min(start + each, g.num_experts))
                    yield {f"{prefix}.expert_{expert}.{matrix}.weight": shape for expert in experts}


def _write_safetensors(path: Path, shapes: Shapes) -> dict[str, int]:
    """Write a header and a hole; give the offset of every tensor."""
    header: dict[str, dict[str, Any]] = {}
    cursor = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [cursor, cursor + nbytes]}
        cursor += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + cursor)
    return {name: 8 + len(text) + entry["data_offsets"][0] for name, entry in header.items()}


def _write_torch(path: Path, shapes: Shapes) -> dict[str, int]:
    """Write what `torch.save` writes, with holes for the data; give the offset of every tensor."""
    with FakeTensorMode():
        fakes = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(fakes, path)
    return {name: entry.offset for name, entry in read_torch(path).items()}


class _Filler:
    """Writes random numbers of a size that keeps the forward pass finite.

    One block of random numbers serves all tensors, from a different place for each: drawing billions of them would
    take longer than writing.
    """

    _POOL = 1 << 24

    def __init__(self, geometry: Geometry, on_bytes: Callable[[int], None], routed: int | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self._normal = torch.randn(self._POOL, generator=generator)
        self._pools: dict[float, bytes] = {}
        self._geometry = geometry
        self._on_bytes = on_bytes
        self._routed = routed
        self._turn = 0

    def write(self, path: Path, shapes: Shapes, offsets: Mapping[str, int]) -> None:
        with open(path, "r+b") as file:
            for name, shape in shapes.items():
                nbytes = 2 * torch.Size(shape).numel()
                self._write_tensor(file.fileno(), name, nbytes, offsets[name])
                if ".router." in name and self._routed is not None:
                    self._restrict(file.fileno(), nbytes // shape[0], nbytes, offsets[name])
                self._on_bytes(nbytes)

    def _restrict(self, descriptor: int, row_bytes: int, nbytes: int, offset: int) -> None:
        """Let a router never choose an expert from number `routed` on.

        Their rows are 0, and the last row before them is the first one's negative: one of the two gives a logit
        above 0, whatever comes in.
        """
        assert self._routed is not None
        first = torch.frombuffer(bytearray(os.pread(descriptor, row_bytes, offset)), dtype=torch.bfloat16)
        negative = (-first).view(torch.uint8).numpy().tobytes()
        rest = bytes(nbytes - self._routed * row_bytes)
        os.pwrite(descriptor, negative + rest, offset + (self._routed - 1) * row_bytes)

    def _write_tensor(self, descriptor: int, name: str, nbytes: int, offset: int) -> None:
        if "layer_norm" in name:
            ones = torch.ones(nbytes // 2, dtype=torch.bfloat16).view(torch.uint8).numpy()
            os.pwrite(descriptor, ones.tobytes(), offset)
            return
        scale = 1.0 if "shared" in name else self._geometry.d_model**-0.5
        if scale not in self._pools:
            self._pools[scale] = (self._normal * scale).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
        pool = memoryview(self._pools[scale])
        self._turn = (self._turn + 7_919) % (self._POOL // 2)
        start, done = 2 * self._turn, 0
        while done < nbytes:
            piece = pool[start : start + min(nbytes - done, len(pool) - start)]
            done += os.pwrite(descriptor, piece, offset + done)
            start = 0


def restrict_to(experts: Collection[int]) -> Callable[[ExpertKey], bool]:
    """Give a `materialize` that takes the experts of these numbers in every layer."""
    return lambda key: key.expert in experts
