"""Which expert lies in which slot, and which slot is given up for the next one: the books of a cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from switchrun.checkpoint.types import ExpertKey
from switchrun.experts.counters import CacheCounters
from switchrun.experts.policy import NextUsePolicy
from switchrun.kernels.matrices import ExpertWeights


@dataclass(slots=True)
class Entry:
    """One slot's content; `weights` is None while it is on its way."""

    slot: int
    weights: ExpertWeights | None


class SlotTable:
    """The books of a cache of equal slots; not thread-safe.

    Args:
        num_slots: How many slots there are.

    Attributes:
        slots: Those that there are.
        entries: What lies in a slot, or is on its way there.
        free: Slots that hold nothing.
        policy: Tells which expert leaves.
    """

    def __init__(self, num_slots: int) -> None:
        self.slots = set(range(num_slots))
        self.entries: dict[ExpertKey, Entry] = {}
        self.free = sorted(self.slots, reverse=True)
        self.policy = NextUsePolicy()

    def ask(self, keys: Sequence[ExpertKey], counters: CacheCounters) -> tuple[list[ExpertKey], list[ExpertKey]]:
        """Take note of a layer's request; its hits are in use from now on.

        Returns:
            Which experts are in slots, and which are missing.
        """
        hits = [key for key in keys if key in self.entries]
        counters.requests += len(keys)
        counters.hits += len(hits)
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
        """Make the books anew from the entries that are complete: all idle, all other slots free."""
        for key in [key for key, entry in self.entries.items() if entry.weights is None]:
            del self.entries[key]
        self.policy.keep(self.entries)
        taken = {entry.slot for entry in self.entries.values()}
        self.free = sorted(self.slots - taken, reverse=True)

    def keep_only(self, num_slots: int) -> None:
        """Give up the slots from a number on, and what lies in them."""
        self.slots = {slot for slot in self.slots if slot < num_slots}
        self.drop(key for key, entry in self.entries.items() if entry.slot >= num_slots)

    def drop(self, keys: Iterable[ExpertKey]) -> None:
        """Forget experts; nothing is in use."""
        for key in list(keys):
            del self.entries[key]
        self.rebuild()
