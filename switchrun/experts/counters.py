"""What a cache counts, and how the counters of its tiers add up. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class CacheCounters:
    """What a cache did since it was made.

    Attributes:
        requests: Experts asked for, once for each layer and step that needs one.
        hits: Of those, the ones that were in memory.
        loads: Experts brought from the slower tier.
        load_bytes: Bytes brought for them; of reads, alignment included.
        load_seconds: Time in which at least one read was under way.
        wait_seconds: Time in which the model stood still for a read, or for a copy.
    """

    requests: int = 0
    hits: int = 0
    loads: int = 0
    load_bytes: int = 0
    load_seconds: float = 0.0
    wait_seconds: float = 0.0

    def since(self, earlier: CacheCounters) -> CacheCounters:
        """Return what was counted after an earlier snapshot."""
        return CacheCounters(*(getattr(self, name) - getattr(earlier, name) for name in self.__slots__))

    def plus(self, other: CacheCounters) -> CacheCounters:
        """Return what two caches counted together."""
        return CacheCounters(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


def since(tiers: Mapping[str, CacheCounters], earlier: Mapping[str, CacheCounters]) -> dict[str, CacheCounters]:
    """Return what each tier counted after an earlier snapshot."""
    return {tier: counters.since(earlier[tier]) for tier, counters in tiers.items()}


def total(tiers: Mapping[str, CacheCounters]) -> CacheCounters:
    """Return the counters of all tiers as one cache's: a hit is an expert that was in memory, a load one that was read.

    Args:
        tiers: What `ExpertTiers.counters` or `since` returns.
    """
    cpu = tiers["cpu"]
    hits = sum(counters.hits for tier, counters in tiers.items() if tier != "cpu")
    return CacheCounters(
        requests=cpu.requests + hits,  # what a GPU missed is a request of the CPU's already
        hits=cpu.hits + hits,
        loads=cpu.loads,
        load_bytes=cpu.load_bytes,
        load_seconds=cpu.load_seconds,
        wait_seconds=sum(counters.wait_seconds for counters in tiers.values()),
    )
