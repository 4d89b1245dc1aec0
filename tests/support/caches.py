"""Expert caches over tiny checkpoints, without a plan or a session."""

from __future__ import annotations

import torch

from switchrun.checkpoint.types import ExpertKey, SwitchCheckpoint
from switchrun.dtypes import Dtype, Precision
from switchrun.experts.buffers import Buffers
from switchrun.experts.cache import ExpertCache
from switchrun.experts.formats import PlainFormat
from switchrun.experts.reader import FileReader, Way
from switchrun.experts.source import ExpertSource
from switchrun.planning import memory


def make_cache(
    checkpoint: SwitchCheckpoint, slots: int, dtype: Dtype = Dtype.FP32, direct: bool = False, way: Way | None = None
) -> ExpertCache:
    """Make a cache with just so many slots."""
    precision = Precision(dtype)
    staging = memory.staging_bytes(checkpoint, precision) // memory.STAGING_BUFFERS
    return ExpertCache(
        PlainFormat(ExpertSource(checkpoint.experts, direct), getattr(torch, dtype.torch_name)),
        slots=Buffers(slots, memory.slot_bytes(checkpoint, precision)),
        staging=Buffers(memory.STAGING_BUFFERS if staging else 0, staging),
        reader=FileReader(direct, way),
    )


def keys(*experts: int) -> list[ExpertKey]:
    """Name experts of the encoder's second block, the first that has any."""
    return [ExpertKey("encoder", 1, expert) for expert in experts]
