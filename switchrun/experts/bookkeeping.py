"""The books of a cache: which expert lies in which slot, which leaves next, and what was counted. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from switchrun.checkpoint.types import ExpertKey
from switchrun.experts.policy import NextUsePolicy

if TYPE_CHECKING:
    from switchrun.kernels.matrices import ExpertWeights


@dataclass(slots=True)
class CacheCounters:
    """What a cache did since it was made.

    An expert is requested once for each layer and step that needs it. A hit was in memory, a load is brought from the
    slower tier; `load_bytes` of reads include alignment. Of both, `hub_loads` and `hub_bytes` came from the Hub. In
    `load_seconds` at least one read was under way, in `wait_seconds` the model stood still for a read, or for a copy.
    """

    requests: int = 0
    hits: int = 0
    loads: int = 0
    load_bytes: int = 0
    load_seconds: float = 0.0
    wait_seconds: float = 0.0
    hub_loads: int = 0
    hub_bytes: int = 0

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
    """Return the counters of all tiers as one cache's: a hit was in some memory, a load was read from disk."""
    cpu = tiers["cpu"]
    hits = sum(counters.hits for tier, counters in tiers.items() if tier != "cpu")
    return CacheCounters(
        requests=cpu.requests + hits,  # what a GPU missed is a request of the CPU's already
        hits=cpu.hits + hits,
        loads=cpu.loads,
        load_bytes=cpu.load_bytes,
        load_seconds=cpu.load_seconds,
        wait_seconds=sum(counters.wait_seconds for counters in tiers.values()),
        hub_loads=cpu.hub_loads,
        hub_bytes=cpu.hub_bytes,
    )


@dataclass(slots=True)
class Entry:
    """One slot's content; `weights` is None while it is on its way."""

    slot: int
    weights: ExpertWeights | None


class SlotTable:
    """What lies in each of a cache's equal slots, or is on its way there; not thread-safe."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.entries: dict[ExpertKey, Entry] = {}
        self.free = list(reversed(range(num_slots)))
        self.policy = NextUsePolicy()
        self.counters = CacheCounters()

    def ask(self, keys: Sequence[ExpertKey]) -> tuple[list[ExpertKey], list[ExpertKey]]:
        """Note a layer's request; return which experts are in slots, in use from now on, and which are missing."""
        hits = [key for key in keys if key in self.entries]
        self.counters.requests += len(keys)
        self.counters.hits += len(hits)
        self.policy.begin_visit()
        for key in hits:
            self.policy.use(key)
        return hits, [key for key in keys if key not in self.entries]

    def take(self) -> int | None:
        """Return a free slot, or that of the expert that is needed last and is not in use; None if there is none."""
        if self.free:
            return self.free.pop()
        victim = self.policy.victim()
        return None if victim is None else self.entries.pop(victim).slot

    def put(self, key: ExpertKey, slot: int, weights: ExpertWeights | None) -> None:
        """Note what a taken slot is for; the expert is in use."""
        self.entries[key] = Entry(slot, weights)
        self.policy.use(key)

    def rebuild(self) -> None:
        """Keep the entries that are complete: all idle, all other slots free."""
        self.entries = {key: entry for key, entry in self.entries.items() if entry.weights is not None}
        self.policy.keep(self.entries)
        taken = {entry.slot for entry in self.entries.values()}
        self.free = [slot for slot in reversed(range(self.num_slots)) if slot not in taken]

    def keep_only(self, num_slots: int) -> None:
        """Give up the slots from a number on, and what lies in them."""
        self.num_slots = num_slots
        self.drop(key for key, entry in self.entries.items() if entry.slot >= num_slots)

    def drop(self, keys: Iterable[ExpertKey]) -> None:
        """Forget experts; nothing is in use."""
        for key in list(keys):
            del self.entries[key]
        self.rebuild()
