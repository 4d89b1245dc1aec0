"""A checkpoint as plain transformers wants it for offloading to disk: every name of the embedding has a tensor."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from switchrun.bench.page_cache import drop_page_cache
from switchrun.checkpoint.types import SwitchCheckpoint

_SHARED = "shared.weight"
_NAMES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_INDEX = "model.safetensors.index.json"
_EXTRA = "embeddings.safetensors"


def complete_checkpoint(checkpoint: SwitchCheckpoint, scratch: Path) -> Path:
    """Give a folder that the stock recipe can open with weights on disk; the checkpoint's own where it will do.

    With an untied head transformers 5.24 takes the embeddings of encoder and decoder for weights of their own, and
    accelerate fails with a KeyError if they stay on disk and the checkpoint has only `shared.weight`. The new folder
    has links to the checkpoint's files and one file more with two copies of it.

    Args:
        checkpoint: A sharded safetensors checkpoint gets a new folder if it needs one; others are let be.
        scratch: Where the folder is made.
    """
    missing = [name for name in _NAMES if name not in checkpoint.dense]
    if checkpoint.config.get("tie_word_embeddings", True) or not missing or not (checkpoint.path / _INDEX).is_file():
        return checkpoint.path
    folder = scratch / "model"
    folder.mkdir()
    for file in checkpoint.path.iterdir():
        if file.name != _INDEX:
            (folder / file.name).symlink_to(file.resolve())
    index = json.loads((checkpoint.path / _INDEX).read_text(encoding="utf-8"))
    index["weight_map"] |= dict.fromkeys(missing, _EXTRA)
    (folder / _INDEX).write_text(json.dumps(index), encoding="utf-8")
    _write_copies(checkpoint, missing, folder / _EXTRA)
    drop_page_cache([folder / _EXTRA])
    return folder


def _write_copies(checkpoint: SwitchCheckpoint, names: list[str], path: Path) -> None:
    shared = checkpoint.dense[_SHARED]
    with open(shared.file, "rb") as file:
        data = os.pread(file.fileno(), shared.nbytes, shared.offset)
    header = {
        name: {
            "dtype": shared.dtype,
            "shape": shared.shape,
            "data_offsets": [number * shared.nbytes, (number + 1) * shared.nbytes],
        }
        for number, name in enumerate(names)
    }
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _ in names:
            out.write(data)
