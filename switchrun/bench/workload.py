"""The input of a measurement: token ids drawn from a seed, so that no tokenizer is needed and lengths are exact."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

#: T5's vocabularies end with sentinels and unused ids; the small ones of tests have no room to leave out any.
_LEFT_OUT = 128
_SMALL = 1024


def make_inputs(config: Mapping[str, Any], batch_size: int, input_tokens: int, seed: int) -> list[list[int]]:
    """Draw a batch of sequences, each of them words at random and the end of sequence.

    Args:
        config: The model's; `vocab_size` and `eos_token_id` are used.
        batch_size: Sequences.
        input_tokens: Tokens of each, the end included.
        seed: The same seed gives the same ids; a larger batch begins with the smaller one's rows.
    """
    vocabulary = int(config["vocab_size"])
    top = vocabulary - _LEFT_OUT if vocabulary > _SMALL else vocabulary
    end = int(config.get("eos_token_id") or 1)
    rows = []
    for row in range(batch_size):
        draw = random.Random(f"{seed} {row}")
        rows.append([draw.randrange(3, top) for _ in range(input_tokens - 1)] + [end])
    return rows
