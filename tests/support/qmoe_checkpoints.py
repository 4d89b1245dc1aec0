"""Makes tiny QMoE checkpoints, as QMoE's own code saves them, of models that plain transformers can load too.

model = ternary_model(qmoe_config(d_model=34), seed=1)
folder = save_qmoe(model, path)                      # config.json, noexp.pt, expNN.pt, sizes.pt
twin = save_twin(model, other_path)                  # the same weights decoded, in bf16: the oracle's folder
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from switchrun.kernels import qmoe
from tests.support.checkpoints import oracle_state, random_model, save_checkpoint, save_tiny_tokenizer, tiny_config

#: Which rows of a ternary matrix are unlike the others: no value below zero, none above, or nothing but zeros.
_NO_NEGATIVES, _NO_POSITIVES, _ALL_ZERO = 3, 5, 7
_ALIASES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


def qmoe_config(**overrides: Any) -> SwitchTransformersConfig:
    """Like switch-c-2048 in small: experts in each of 2 + 2 blocks, a head of its own; d_model and d_ff are even."""
    values = {"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 2, "tie_word_embeddings": False}
    return tiny_config(**(values | overrides))


def ternary_model(
    config: SwitchTransformersConfig,
    seed: int = 0,
    *,
    zeros: float = 0.885,
    odd_rows: bool = True,
    router_dtype: torch.dtype = torch.bfloat16,
) -> SwitchTransformersForConditionalGeneration:
    """A random model in bfloat16, whose experts have three values in each row: zero, a minimum and a maximum.

    Args:
        config: See `qmoe_config`.
        seed: Other weights for each.
        zeros: Which share of the experts' weights is zero; their standard deviation stays what it was.
        odd_rows: Some rows have no negatives, some no positives, and some are all zero.
        router_dtype: Of the routers' weights.
    """
    model = random_model(config, seed, torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if ".experts." in name:
            weight.data = _ternary(weight.data, zeros, odd_rows, generator)
        elif ".router." in name:
            weight.data = weight.data.to(router_dtype)
    return model


def save_qmoe(
    model: SwitchTransformersForConditionalGeneration,
    folder: Path,
    *,
    copies: bool = False,
    string_order: bool = False,
    tokenizer: bool = True,
) -> Path:
    """Write a ternary model as a QMoE checkpoint.

    Args:
        model: See `ternary_model`. It is not changed.
        folder: Where to write; made if need be.
        copies: The embedding is stored for each stack, and not once under three names.
        string_order: As torch 2.0 wrote files, with storages in string order: an expert's are no neighbours then.
        tokenizer: Whether the folder has a tokenizer.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = oracle_state(model)
    dense = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for name in _ALIASES:
        dense.setdefault(name, dense["shared.weight"].clone() if copies else dense["shared.weight"])
    if model.config.tie_word_embeddings:
        dense["lm_head.weight"] = dense["shared.weight"].clone()
    _save(dense, folder / "noexp.pt", string_order)
    sizes: dict[str, int] = {}
    for number, (layer, experts) in enumerate(_layers(model)):
        part: dict[str, torch.Tensor] = {}
        for expert in range(experts):
            for matrix in ("wi", "wo"):
                name = f"{layer}.experts.expert_{expert}.{matrix}"
                packed = encode(state[f"{name}.weight"])
                part |= {
                    f"{name}.w_comp": packed.codes,
                    f"{name}.row_off": packed.offsets,
                    f"{name}.ter_minmax": packed.extremes,
                    f"{name}.weight": torch.zeros(0, dtype=torch.bfloat16),
                }
                sizes[name] = len(packed.codes)
        _save(part, folder / f"exp{number:02}.pt", string_order)
    _save(sizes, folder / "sizes.pt", string_order)
    (folder / "config.json").write_text(json.dumps(_config(model), indent=2))
    if tokenizer:
        save_tiny_tokenizer(folder, model.config.vocab_size)
    return folder


def save_twin(model: SwitchTransformersForConditionalGeneration, folder: Path) -> Path:
    """Write a ternary model as plain transformers loads it: safetensors, in bfloat16, with the same tokenizer.

    If the head is no embedding, transformers 5 makes up random ones for stacks whose own are not stored.
    """
    save_checkpoint(model, folder)
    state = oracle_state(model)
    if not model.config.tie_word_embeddings:
        state |= {name: state["shared.weight"].clone() for name in _ALIASES}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return save_tiny_tokenizer(folder, model.config.vocab_size)


def encode(weight: torch.Tensor) -> qmoe.QmoeMatrix:
    """Encode a matrix of three values a row, as QMoE does: what is the row's minimum is 1, its maximum 2.

    So zeros are 1 in a row without negatives, and 2 in one without positives or with nothing but zeros.
    """
    weight = weight.bfloat16()
    least, most = weight.amin(1), weight.amax(1)
    digits = torch.zeros_like(weight, dtype=torch.uint8)
    digits[weight == least.unsqueeze(1)] = 1
    digits[weight == most.unsqueeze(1)] = 2
    return qmoe.encode(digits, torch.stack([least, most], 1).flatten())


def rewrite(path: Path, change: Any) -> None:
    """Load a file of a checkpoint, let `change` work on the dictionary, and save it again."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def _ternary(weight: torch.Tensor, zeros: float, odd_rows: bool, generator: torch.Generator) -> torch.Tensor:
    size = float(weight.float().std()) * (1 - zeros) ** -0.5
    chance = torch.rand(weight.shape, generator=generator)
    # Each row has a size of its own, and another one below zero.
    least, most = -size * (0.8 + 0.4 * torch.rand(2, len(weight), 1, generator=generator))
    values = torch.where(chance < (1 - zeros) / 2, least, torch.where(chance < 1 - zeros, -most, 0.0))
    if odd_rows:
        values[_NO_NEGATIVES::16].clamp_(min=0)
        values[_NO_POSITIVES::16].clamp_(max=0)
        values[_ALL_ZERO::16] = 0
    return (values + 0.0).to(weight.dtype)  # -0.0 is none of the three values


def _layers(model: SwitchTransformersForConditionalGeneration) -> Iterator[tuple[str, int]]:
    """Yield the name of each sparse MLP, the encoder's first, and how many experts it has."""
    for stack, layer in (("encoder", 1), ("decoder", 2)):
        for number, block in enumerate(getattr(model, stack).block):
            if block.is_sparse:
                yield f"{stack}.block.{number}.layer.{layer}.mlp", model.config.num_experts


def _config(model: SwitchTransformersForConditionalGeneration) -> dict[str, Any]:
    """Give the config.json of transformers 4.28: the old key of the dtype, and for switch-c-2048 a wrong step."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = ["SwitchTransformersForConditionalGeneration"]
    config.pop("dtype", None)
    config["torch_dtype"] = "bfloat16"
    if all(block.is_sparse for block in model.decoder.block):
        config["is_full_sparse"] = True
        config["decoder_sparse_step"] = 0
    return config


def _save(state: dict[str, Any], path: Path, string_order: bool) -> None:
    if not string_order:
        torch.save(state, path)
        return
    file = io.BytesIO()
    torch.save(state, file)
    with zipfile.ZipFile(file) as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    writer = torch._C.PyTorchFileWriter(str(path))
    storages = sorted(name for name in entries if name.startswith("data/"))
    for name in ("data.pkl", *storages):
        writer.write_record(name, entries[name], len(entries[name]))
    writer.write_end_of_file()
