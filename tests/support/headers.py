"""Reading the headers of one local file."""

from __future__ import annotations

from pathlib import Path

from switchrun.checkpoint import safetensors_file, torch_file
from switchrun.checkpoint.files import open_weights
from switchrun.checkpoint.types import TensorSlice


def read_safetensors(path: Path) -> dict[str, TensorSlice]:
    """Read which tensors a safetensors file holds, and where."""
    with open_weights(path) as file:
        return safetensors_file.read_safetensors(file)


def read_torch(path: Path) -> dict[str, TensorSlice]:
    """Read which tensors a torch file holds, and where."""
    with open_weights(path) as file:
        return torch_file.read_torch(file)
