"""Cells: one combination of settings each, and the product that makes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Cache = Literal["cold", "warm"]
Baseline = Literal["accelerate"]


@dataclass(frozen=True, slots=True)
class Cell:
    """What is measured, and how.

    Attributes:
        model: A folder or a Hub id; None for the demo model.
        dtype: The compute dtype; `auto` is as stored.
        cpu_memory_bytes: What the process may take; None for most of what is available.
        gpu_memory: What may be taken on GPUs, as `--gpu-memory` has it.
        batch_size: Sequences that run together.
        input_tokens: Tokens of each sequence.
        output_tokens: Tokens generated for each, no fewer and no more.
        repeats: Measured fills.
        warmup: Fills before them that are thrown away.
        cache: `cold`: each fill in a process of its own, and the checkpoint not in the page cache. `warm`: all fills
            in one process, which keeps its experts.
        seed: Decides the input tokens.
        memory_limit_bytes: What the process and its page cache may take together; None is no limit.
        baseline: What else is measured beside it.
    """

    model: str | None
    dtype: str = "auto"
    cpu_memory_bytes: int | None = None
    gpu_memory: str | None = None
    batch_size: int = 1
    input_tokens: int = 24
    output_tokens: int = 12
    repeats: int = 3
    warmup: int = 0
    cache: Cache = "cold"
    seed: int = 0
    memory_limit_bytes: int | None = None
    baseline: Baseline | None = None

    def knobs(self) -> dict[str, Any]:
        """Give every setting, as it stands in a record."""
        return asdict(self)


def product(
    first: Cell, dtypes: Sequence[str], cpu_memories: Sequence[int | None], batch_sizes: Sequence[int]
) -> list[Cell]:
    """Give a cell for each combination; the last list varies fastest."""
    return [
        replace(first, dtype=dtype, cpu_memory_bytes=memory, batch_size=batch)
        for dtype, memory, batch in itertools.product(dtypes, cpu_memories, batch_sizes)
    ]
