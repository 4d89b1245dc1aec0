"""Sessions over tiny checkpoints, and the plain transformers that they must agree with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from switchrun import Session
from switchrun.checkpoint import open_checkpoint
from switchrun.experts import reader
from switchrun.experts.reader import Way
from switchrun.machine import ram
from switchrun.model.live_rows import CACHE_ARGUMENT
from switchrun.planning import Budgets
from switchrun.planning.device_map import read_device_map
from switchrun.planning.planner import make_plan

_TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}
_EVERYTHING = 1 << 40


@pytest.fixture
def small_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sessions believe that the process is as small as the command's: pytest and an oracle live in it too."""
    monkeypatch.setattr(ram, "rss_bytes", lambda: 0)


def read_in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sessions opened from now on read 512 bytes at a time: then `wi` of a tiny expert is there before `wo`."""
    monkeypatch.setattr(reader, "Way", lambda: Way(2, 512, False))


def open_with_slots(folder: Path, slots: int | None, **options: Any) -> Session:
    """Open a session with just so many expert slots, all dense weights in memory; None is a slot for each expert."""
    checkpoint = open_checkpoint(str(folder))
    settings = {name: options[name] for name in ("dtype", "batch_size", "num_beams") if name in options}
    settings["output_tokens"] = options.get("max_new_tokens", 64)  # as `OpenOptions` has it
    whole = make_plan(checkpoint, Budgets(_EVERYTHING), device_map=read_device_map({"": "cpu"}), **settings).tier("cpu")
    count = whole.expert_slots if slots is None else min(slots, whole.expert_slots)
    budget = whole.total_bytes - (whole.expert_slots - count) * whole.slot_bytes
    options.setdefault("device_map", {"": "cpu"})
    session = Session.open(folder, cpu_memory=budget, **options)
    if options["device_map"] == {"": "cpu"}:
        assert session.plan.tier("cpu").expert_slots == count
    return session


def oracle_for(model: Any, dtype: str) -> Any:
    """Give plain transformers in a compute dtype, as `from_pretrained(dtype=…)` does it."""
    oracle = copy.deepcopy(model).to(_TORCH[dtype]).eval()
    oracle.generation_config.max_length = None
    return oracle


def encode(session: Session, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenise a batch as the session does."""
    encoded = session._tokenizer._tokenizer(list(texts), padding=True, return_tensors="pt")
    return encoded.input_ids, encoded.attention_mask


def generate(oracle: Any, session: Session, texts: Sequence[str], **options: Any) -> list[list[int]]:
    """Give the oracle's ids for a batch, without the padding behind the end."""
    input_ids, attention_mask = encode(session, texts)
    if oracle.config.num_decoder_layers > oracle.config.num_layers:
        # transformers 5.23 makes a cache with as many layers as the encoder, and fails.
        options[CACHE_ARGUMENT] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    input_ids, attention_mask = input_ids.to(oracle.device), attention_mask.to(oracle.device)
    with torch.no_grad():
        rows = oracle.generate(input_ids, attention_mask=attention_mask, do_sample=False, **options).tolist()
    eos = oracle.generation_config.eos_token_id
    return [_until_end(row, eos if isinstance(eos, list) else [eos]) for row in rows]


def _until_end(row: list[int], eos: list[int]) -> list[int]:
    end = next((at for at in range(1, len(row)) if row[at] in eos), len(row))
    return row[: end + 1]
