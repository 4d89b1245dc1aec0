"""What a session adds up over its fills, and what it reads off the process and the cache."""

from __future__ import annotations

import torch

from switchrun import hardware
from switchrun.experts.slot_table import CacheCounters
from switchrun.model.records import ExpertCounts, MemoryPeak, SessionStats, Timing, TokenCounts
from switchrun.planning.types import TierUse


class Totals:
    """Sums over the inputs that a session answered."""

    def __init__(self) -> None:
        self.fill_seconds = 0.0
        self._inputs = self._output_tokens = self._later_tokens = 0
        self._ttft_seconds = self._later_seconds = 0.0

    def add(self, tokens: TokenCounts, timing: Timing) -> None:
        """Add one answered input."""
        self._inputs += 1
        self._output_tokens += tokens.output
        self._ttft_seconds += timing.ttft_seconds
        if timing.itl_seconds is not None:
            self._later_tokens += tokens.output - 1
            self._later_seconds += timing.itl_seconds * (tokens.output - 1)

    def stats(self, tiers: tuple[TierUse, ...], open_seconds: float, counters: CacheCounters) -> SessionStats:
        """Give the sums beside what a session knows otherwise."""
        return SessionStats(
            tiers=tiers,
            memory=memory_peak(),
            open_seconds=open_seconds,
            inputs=self._inputs,
            output_tokens=self._output_tokens,
            fill_seconds=self.fill_seconds,
            ttft_seconds=self._ttft_seconds / self._inputs if self._inputs else None,
            itl_seconds=self._later_seconds / self._later_tokens if self._later_tokens else None,
            experts=expert_counts(counters),
            wait_seconds=counters.wait_seconds,
        )


def expert_counts(counters: CacheCounters) -> ExpertCounts:
    """Give the counters that a record has."""
    return ExpertCounts(counters.requests, counters.hits, counters.loads, counters.load_bytes, counters.load_seconds)


def memory_peak() -> MemoryPeak:
    """Give the peaks of this process so far."""
    gpu = int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None
    return MemoryPeak(hardware.peak_rss_bytes(), gpu)
