"""Which expert leaves memory: the one that will be needed last, as far as the past tells. No torch."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from math import inf

from switchrun.checkpoint.types import ExpertKey, Stack

#: Visits of layers after which what was counted weighs half.
FADE_VISITS = 10_000
#: Counts fade no further than this: an expert may stay in memory for ever without being used, and 0 cannot divide.
_LEAST_COUNT = 2.0**-30


class NextUsePolicy:
    """Evicts the expert whose next use is expected to be farthest away.

    A model visits its sparse layers in a cycle, so what was used last is not what is needed next. With time counted
    in visits of layers, an expert that was used in `count` of `elapsed` visits is needed every `elapsed / count`
    visits, and not before its layer's turn comes again. So its next use is expected at

        last visit of its layer + elapsed / count

    and the farthest leaves: mostly a rare expert, and among equals one of the layer just left. A layer that was
    visited once has not shown that its turn comes again, and the encoder's do not before the next text: its experts
    leave before all others, the earliest layer's first. Counts outlive eviction, and fade so that a change of subject
    is followed. `docs/eviction.md` compares this with other policies.

    An expert is either idle or in use; only idle ones can be evicted. Each call costs O(log experts); `victim` looks
    at one expert of every layer. Not thread-safe.

    Args:
        fade_visits: Visits after which counts are halved.
    """

    def __init__(self, fade_visits: int = FADE_VISITS) -> None:
        self._fade_visits = fade_visits
        self._now = 0
        self._elapsed = 0.0  # fades as the counts do
        self._counts: dict[ExpertKey, float] = {}
        self._layers: dict[tuple[Stack, int], _Layer] = {}

    def begin_visit(self) -> None:
        """A layer's turn has come: the clock moves on."""
        self._now += 1
        self._elapsed += 1
        if self._elapsed >= self._fade_visits:
            self._elapsed /= 2
            self._counts = {key: max(count / 2, _LEAST_COUNT) for key, count in self._counts.items()}
            for layer in self._layers.values():
                layer.rebuild(self._counts)

    def use(self, key: ExpertKey) -> None:
        """An expert of the layer is asked for, in memory or not: it is in use until it is released."""
        layer = self._layers.setdefault((key.stack, key.block), _Layer(self._now))
        layer.last_visit = self._now
        layer.idle.discard(key)
        self._counts[key] = self._counts.get(key, 0.0) + 1

    def release(self, key: ExpertKey) -> None:
        """An expert that was used is idle again; it stays in memory."""
        self._layers[key.stack, key.block].add(key, self._counts)

    def keep(self, keys: Iterable[ExpertKey]) -> None:
        """Let these experts be idle and forget all others that are in memory; what was counted stays."""
        for layer in self._layers.values():
            layer.idle.clear()
        for key in keys:
            self.release(key)

    def victim(self) -> ExpertKey | None:
        """Forget one idle expert, so that its slot can be taken; None if none is idle."""
        farthest, chosen = (False, -inf), None
        for layer in self._layers.values():
            count = layer.lowest_count(self._counts)
            if count is None:
                continue
            visited_once = layer.last_visit == layer.first_visit
            next_use = (visited_once, -layer.last_visit if visited_once else layer.last_visit + self._elapsed / count)
            if next_use > farthest:
                farthest, chosen = next_use, layer
        return None if chosen is None else chosen.pop()


class _Layer:
    """One layer's idle experts, the least used first.

    An item of the heap holds as long as its expert is idle and has that count; others are dropped when they come up.
    """

    def __init__(self, first_visit: int) -> None:
        self.first_visit = self.last_visit = first_visit
        self.idle: set[ExpertKey] = set()
        self._heap: list[tuple[float, ExpertKey]] = []

    def add(self, key: ExpertKey, counts: dict[ExpertKey, float]) -> None:
        self.idle.add(key)
        heapq.heappush(self._heap, (counts[key], key))
        if len(self._heap) > 2 * len(self.idle) + 64:
            self.rebuild(counts)

    def lowest_count(self, counts: dict[ExpertKey, float]) -> float | None:
        while self._heap:
            count, key = self._heap[0]
            if key in self.idle and counts[key] == count:
                return count
            heapq.heappop(self._heap)
        return None

    def pop(self) -> ExpertKey:
        """Take out the least used, which `lowest_count` has just found."""
        key = heapq.heappop(self._heap)[1]
        self.idle.remove(key)
        return key

    def rebuild(self, counts: dict[ExpertKey, float]) -> None:
        self._heap = [(counts[key], key) for key in self.idle]
        heapq.heapify(self._heap)
