"""Plain transformers on a folder: what it answers is the right answer, if it answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, SwitchTransformersForConditionalGeneration


def load(folder: Path) -> Any:
    """Open a model as most people do."""
    return SwitchTransformersForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()


def answers(folder: Path, texts: Sequence[str], tokens: int, *, model: Any = None, **options: Any) -> list[list[int]]:
    """Generate for each text by itself; ids up to the end of the sequence.

    Raises whatever transformers raises.
    """
    model = model or load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if model.generation_config.stop_strings is not None:
        options["tokenizer"] = tokenizer
    eos = model.generation_config.eos_token_id
    ends = torch.tensor([] if eos is None else eos).flatten().long().tolist()
    ours = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}
    found = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        given = {"attention_mask": inputs.attention_mask, "max_new_tokens": tokens} | ours | options
        with torch.no_grad():
            ids = model.generate(inputs.input_ids, **given)[0].tolist()
        found.append(next((ids[: at + 1] for at in range(1, len(ids)) if ids[at] in ends), ids))
    return found
