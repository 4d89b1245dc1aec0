"""Makes checkpoints in 8 bit of plain ones, as transformers saves them with bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from switchrun.checkpoint.names import EXPERT_NAME, LINEAR_NAME, scales_of
from switchrun.kernels.int8 import quantise_int8
from tests.support.edits import edit_config

QUANTISED = {"load_in_8bit": True, "llm_int8_threshold": 6.0, "quant_method": "bitsandbytes"}


def save_in_int8(folder: Path, keep: Callable[[str], bool] = lambda _: False) -> Path:
    """Turn the linear layers of a saved checkpoint into int8, in its only file.

    transformers does so with all but the head, the routers' too.

    Args:
        folder: The checkpoint, `model.safetensors` or `pytorch_model.bin`.
        keep: Tells of a weight's name whether it stays as it is.
    """
    path = folder / "model.safetensors"
    if path.exists():
        tensors = in_int8(load_file(path), keep)
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        path = folder / "pytorch_model.bin"
        tensors = in_int8(torch.load(path), keep)
        torch.save(tensors, path)
    edit_config(folder, quantization_config=QUANTISED)
    return folder


def in_int8(tensors: dict[str, torch.Tensor], keep: Callable[[str], bool]) -> dict[str, torch.Tensor]:
    """Give all tensors, those of linear layers as codes, scales and the number of their layout."""
    result = {}
    for name, tensor in tensors.items():
        if keep(name) or not (EXPERT_NAME.fullmatch(name) or LINEAR_NAME.fullmatch(name)):
            result[name] = tensor
            continue
        codes, scb = torch.empty_like(tensor, dtype=torch.int8), torch.empty(len(tensor))
        quantise_int8(tensor, codes, scb)
        result |= {name: codes, scales_of(name): scb, f"{name}_format": torch.tensor(0, dtype=torch.uint8)}
    return result
