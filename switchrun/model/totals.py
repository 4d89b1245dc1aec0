"""What a session adds up over its fills, and what it reads off the process and the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from switchrun import hardware
from switchrun.experts import accelerator
from switchrun.experts.levels import total
from switchrun.experts.slot_table import CacheCounters
from switchrun.model.records import ExpertCounts, MemoryPeak, SessionStats, TierCounts, Timing, TokenCounts
from switchrun.planning.types import Plan


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

    def stats(self, plan: Plan, open_seconds: float, levels: Mapping[str, CacheCounters]) -> SessionStats:
        """Give the sums beside what a session knows otherwise."""
        return SessionStats(
            tiers=plan.tiers,
            memory=memory_peak(plan.gpus),
            open_seconds=open_seconds,
            inputs=self._inputs,
            output_tokens=self._output_tokens,
            fill_seconds=self.fill_seconds,
            ttft_seconds=self._ttft_seconds / self._inputs if self._inputs else None,
            itl_seconds=self._later_seconds / self._later_tokens if self._later_tokens else None,
            experts=expert_counts(levels),
            wait_seconds=total(levels).wait_seconds,
        )


def expert_counts(levels: Mapping[str, CacheCounters]) -> ExpertCounts:
    """Give the counters that a record has; see `ExpertLevels.counters`."""
    all_together = total(levels)
    return ExpertCounts(
        all_together.requests,
        all_together.hits,
        all_together.loads,
        all_together.load_bytes,
        all_together.load_seconds,
        tuple(TierCounts(tier, c.requests, c.hits, c.loads, c.load_bytes) for tier, c in levels.items()),
    )


def memory_peak(gpus: Sequence[int]) -> MemoryPeak:
    """Give the peaks of this process so far, those of the GPUs that it uses added up: no other is asked."""
    return MemoryPeak(hardware.peak_rss_bytes(), sum(map(accelerator.peak_bytes, gpus)) if gpus else None)
