"""The stock recipe of transformers and accelerate, in a process of its own; for `against_accelerate.py`."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path
from typing import Any

from switchrun.bench.child_process import Answer, Task, answer_task
from switchrun.bench.measure import make_inputs
from switchrun.bench.raw_disk import drop_page_cache, io_read_bytes
from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.machine import processor, ram

_SHARED = "shared.weight"
_NAMES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_INDEX = "model.safetensors.index.json"
_EXTRA = "embeddings.safetensors"


def measure(task: Task) -> Answer:
    """Open the checkpoint as transformers' documentation says, and generate once.

    The task is that of `switchrun.bench.measure`, with `torch_dtype`, and `scratch` for what stays on disk.
    """
    import torch
    from transformers import SwitchTransformersForConditionalGeneration

    from switchrun.planning.budgets import resolve_budgets

    budgets = resolve_budgets(task["cpu_memory_bytes"], None)
    model: Any = SwitchTransformersForConditionalGeneration.from_pretrained(
        task["model"],
        dtype=getattr(torch, task["torch_dtype"]),
        device_map="auto",
        max_memory={**budgets.gpu_bytes, "cpu": budgets.cpu_bytes},
        offload_folder=task["scratch"],
    )
    opened, open_bytes = processor.process_age_seconds(), io_read_bytes()
    rows = make_inputs(model.config.to_dict(), task["batch_size"], task["input_tokens"], task["seed"])
    start = time.perf_counter()
    ids = torch.tensor(rows)
    if model.device.type != "meta":
        ids = ids.to(model.device)
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=task["output_tokens"],
            min_new_tokens=task["output_tokens"],
            do_sample=False,
            num_beams=1,
        )
    fill = {
        "seconds": time.perf_counter() - start,
        "output_ids": output.tolist(),
        "peak_rss_bytes": ram.peak_rss_bytes(),
    }
    return {"open_seconds": opened, "open_io_read_bytes": open_bytes, "fills": [fill]}


def complete_checkpoint(checkpoint: SwitchCheckpoint, scratch: Path) -> Path:
    """Return a folder that the stock recipe can open with weights on disk; the checkpoint's own where it will do.

    With an untied head transformers 5.24 takes the embeddings of encoder and decoder for weights of their own, and
    accelerate fails with a KeyError if they stay on disk and the checkpoint has only `shared.weight`. A sharded
    safetensors checkpoint then gets a folder in `scratch` with links to its files and two copies of that weight.
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
    assert isinstance(shared.file, Path)
    with open(shared.file, "rb") as file:
        data = os.pread(file.fileno(), shared.nbytes, shared.offset)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for number, name in enumerate(names):
        ends = [number * shared.nbytes, (number + 1) * shared.nbytes]
        header[name] = {"dtype": shared.dtype, "shape": shared.shape, "data_offsets": ends}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for _ in names:
            out.write(data)


if __name__ == "__main__":
    answer_task(lambda task, _report: measure(task))
