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
    ours = {"do_sample": False, "num_beams": 1, "max_new_tokens": tokens}
    return own_answers(folder, texts, model=model, **ours | options)


def own_answers(
    folder: Path, texts: Sequence[str], *, model: Any = None, seed: int | None = None, **options: Any
) -> list[list[int]]:
    """Generate as above, but as the folder's own settings say, but for these options; each text with the same seed."""
    model = model or load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if model.generation_config.stop_strings is not None:
        options["tokenizer"] = tokenizer
    eos = model.generation_config.eos_token_id
    ends = torch.tensor([] if eos is None else eos).flatten().long().tolist()
    ours = {"num_return_sequences": 1, "return_dict_in_generate": False}
    found = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad(), torch.random.fork_rng(()):
            if seed is not None:
                torch.manual_seed(seed)
            ids = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, **ours | options)[0].tolist()
        found.append(next((ids[: at + 1] for at in range(1, len(ids)) if ids[at] in ends), ids))
    return found
