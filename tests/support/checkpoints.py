"""Makes tiny Switch checkpoints, in every container and dialect that switchrun reads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from switchrun.checkpoint.types import TensorSlice

CONTAINERS = ("safetensors", "torch", "torch-pt")
#: standard: as transformers saves. hub-switch-c: as google/switch-c-2048 lies on the Hub. alias-embedding: the
#: embedding under an alias's name only. copied-head: tied, with a copy of the embedding as its head. extra: with a
#: tensor that T5 once had. nested: the weights under "state_dict" (torch only).
#: own-embeddings: each stack has its own, as transformers 5 allows when the head is untied.
DIALECTS = ("standard", "hub-switch-c", "alias-embedding", "copied-head", "extra", "nested", "own-embeddings")

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_EXPERT = re.compile(r"\.block\.(\d+)\..*\.expert_\d+\.(wi|wo)\.weight$")
_EXTRA = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def tiny_config(**overrides: Any) -> SwitchTransformersConfig:
    """A small configuration: 2 + 2 blocks, 4 experts in every second one."""
    values: dict[str, Any] = {
        "vocab_size": 128, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2,
        "num_experts": 4, "expert_capacity": 64, "dropout_rate": 0.0,
        "num_layers": 2, "num_sparse_encoder_layers": 1, "num_decoder_layers": 2, "num_sparse_decoder_layers": 1,
        "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
    }  # fmt: skip
    return SwitchTransformersConfig(**(values | overrides))


def random_model(
    config: SwitchTransformersConfig, seed: int = 0, dtype: torch.dtype = torch.float32, own_embeddings: bool = False
) -> SwitchTransformersForConditionalGeneration:
    """A random model that behaves: tokens spread over the experts, clear winners among the logits, varied output.

    transformers' own initialisation repeats the last token for ever when the head is tied, for the residual stream is
    mostly that token's embedding. Large MLP and attention outputs and a final norm of random signs prevent it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SwitchTransformersForConditionalGeneration(config).eval()
        for name, weight in model.named_parameters():
            if name.endswith("layer_norm.weight"):
                weight.data = 1 + 0.2 * torch.randn_like(weight)
            if name.endswith((".wo.weight", ".o.weight")):
                weight.data *= 3
            if name.endswith("relative_attention_bias.weight"):
                weight.data = torch.randn_like(weight)
            if name.endswith("classifier.bias"):
                weight.data = torch.randn_like(weight)
        if not own_embeddings:
            # T5 has one embedding; transformers 5 ties the stacks' to it only if the head is tied too.
            model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
        final = model.decoder.final_layer_norm.weight
        final.data = 4 * torch.randn_like(final)
    return model.to(dtype)


def save_checkpoint(
    model: SwitchTransformersForConditionalGeneration,
    folder: Path,
    *,
    container: str = "safetensors",
    sharded: bool = False,
    dialect: str = "standard",
    dtype: torch.dtype | None = None,
    transposed: bool = False,
) -> Path:
    """Write a model as a checkpoint: `config.json` and weights.

    Args:
        model: The model. It is not changed.
        folder: Where to write; made if need be.
        container: One of `CONTAINERS`; `torch-pt` is never sharded.
        sharded: Dense weights, `wi` and `wo` in files of their own, with an index.
        dialect: One of `DIALECTS`. `hub-switch-c` needs a model with an untied head and nothing but sparse blocks,
            `copied-head` a tied one, `nested` a torch container that is not sharded.
        dtype: What to store as; by default as the model is. A model that has this dtype already is its own oracle.
        transposed: Matrices in column-major order (torch containers only).

    Returns:
        The folder.
    """
    assert container in CONTAINERS
    assert dialect in DIALECTS
    folder.mkdir(parents=True, exist_ok=True)
    stored = dtype or model.dtype
    tensors = _tensors(model, container, dialect, stored, transposed)
    (folder / "config.json").write_text(json.dumps(_config(model, dialect, stored), indent=2))
    if not sharded:
        name = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin", "torch-pt": "model.pt"}[container]
        _write(tensors, folder / name, container, nested=dialect == "nested")
        return folder
    base, suffix = ("model", "safetensors") if container == "safetensors" else ("pytorch_model", "bin")
    shards: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        shards.setdefault(_shard(name), {})[name] = tensor
    weight_map = {}
    for number, (_, part) in enumerate(sorted(shards.items()), start=1):
        file = f"{base}-{number:05}-of-{len(shards):05}.{suffix}"
        _write(part, folder / file, container, nested=False)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / f"{base}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def oracle_state(model: SwitchTransformersForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The weights that a `SwitchCheckpoint` of this model holds, by canonical name: experts too, no aliases."""
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in _ALIASES or model.get_parameter(name) is not model.shared.weight
    }
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return state


def read_tensor(where: TensorSlice) -> torch.Tensor:
    """Read a tensor's bytes from where a slice says they are."""
    with where.file.open("rb") as file:
        file.seek(where.offset)
        data = bytearray(file.read(where.nbytes))
    flat = torch.frombuffer(data, dtype=_TORCH_DTYPES[where.dtype])
    return flat.view(where.shape[::-1]).t() if where.transposed else flat.view(where.shape)


def save_tiny_tokenizer(folder: Path, vocab_size: int = 128, extra_ids: int = 20) -> Path:
    """Write a T5-like tokenizer that `AutoTokenizer` opens without a network.

    Pad is 0, `</s>` 1, unknown 2; `<extra_id_0>` is the highest id and the others follow downwards. `</s>` is appended.

    Args:
        folder: Where to write.
        vocab_size: As the model's.
        extra_ids: How many sentinels.

    Returns:
        The folder.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    words = "the a man walks into bar and orders beer with pinch of salt cat dog sat on mat red blue".split()
    pieces = [
        "\u2581",
        *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?'",
        *(f"\u2581{word}" for word in words),
    ]
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(extra_ids))]
    filler = [f"\u2581w{number}" for number in range(vocab_size - 3 - len(pieces) - extra_ids)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # A longer piece costs less than its letters do.
    vocab += [(piece, -2.0 if len(piece) > 1 else -5.0) for piece in pieces + filler]
    vocab += [(sentinel, 0.0) for sentinel in sentinels]
    assert len(vocab) == vocab_size
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    special = ["<pad>", "</s>", "<unk>", *reversed(sentinels)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "additional_special_tokens": list(reversed(sentinels)),
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder


def _config(model: SwitchTransformersForConditionalGeneration, dialect: str, stored: torch.dtype) -> dict[str, Any]:
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = ["SwitchTransformersForConditionalGeneration"]
    config["dtype"] = str(stored).removeprefix("torch.")
    if dialect == "hub-switch-c":
        for key in ("architectures", "dtype", "tie_word_embeddings", "encoder_sparse_step", "decoder_sparse_step"):
            config.pop(key, None)
        config["is_full_sparse"] = True
        # Too few, as on the Hub; one block cannot be had with fewer.
        config["num_decoder_layers"] = max(config["num_decoder_layers"] - 1, 1)
    return config


def _tensors(
    model: SwitchTransformersForConditionalGeneration,
    container: str,
    dialect: str,
    dtype: torch.dtype,
    transposed: bool,
) -> dict[str, torch.Tensor]:
    tensors = {name: tensor.to(dtype) for name, tensor in oracle_state(model).items()}
    if transposed:
        assert container != "safetensors", "safetensors keeps no strides"
        tensors = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in tensors.items()}
    tied = model.config.tie_word_embeddings
    shared = tensors["shared.weight"]
    if dialect == "hub-switch-c":
        assert not tied
        assert all(block.is_sparse for stack in (model.encoder, model.decoder) for block in stack.block)
        tensors["decoder.lm_head.weight"] = tensors.pop("lm_head.weight")
    elif dialect == "alias-embedding":
        tensors[_ALIASES[0]] = tensors.pop("shared.weight")
    elif dialect == "copied-head":
        assert tied
        tensors["lm_head.weight"] = shared.clone()
    elif container != "safetensors" and dialect != "own-embeddings":
        # torch.save keeps the aliases, in one storage; safetensors' savers drop them.
        tensors |= dict.fromkeys((*_ALIASES, "lm_head.weight") if tied else _ALIASES, shared)
    if dialect == "extra":
        tensors[_EXTRA] = torch.zeros(8, 2, dtype=dtype)
    return tensors


def _shard(name: str) -> int:
    match = _EXPERT.search(name)
    return 0 if match is None else 1 + 2 * (match[2] == "wo") + int(match[1]) % 2


def _write(tensors: dict[str, torch.Tensor], path: Path, container: str, *, nested: bool) -> None:
    if container == "safetensors":
        assert not nested
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        torch.save({"state_dict": tensors, "epoch": 3} if nested else tensors, path)
