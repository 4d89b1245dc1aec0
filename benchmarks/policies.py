"""Eviction policies to compare with switchrun's own, behind the calls that the expert cache makes.

An expert is in use from `use` (a hit, or about to be read) to `release` (computed), and may not be evicted then.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from typing import Protocol

from switchrun.checkpoint.types import ExpertKey

#: One pass through a sparse layer: the experts that its tokens need.
Visit = tuple[ExpertKey, ...]


class Policy(Protocol):
    """What the cache asks of a policy."""

    def begin_visit(self) -> None:
        """A layer's turn has come."""

    def use(self, key: ExpertKey) -> None:
        """An expert is asked for; it is in use from now on."""

    def release(self, key: ExpertKey) -> None:
        """An expert has been computed; it may be evicted from now on."""

    def victim(self) -> ExpertKey | None:
        """Forget one idle expert and give its name; None if all are in use."""


class _Timeless:
    """A policy that does not ask when layers' turns come."""

    def begin_visit(self) -> None:
        """Do nothing."""


class Lru(_Timeless):
    """Least recently used first."""

    def __init__(self) -> None:
        self._idle: OrderedDict[ExpertKey, None] = OrderedDict()

    def use(self, key: ExpertKey) -> None:  # noqa: D102
        self._idle.pop(key, None)

    def release(self, key: ExpertKey) -> None:  # noqa: D102
        self._idle[key] = None

    def victim(self) -> ExpertKey | None:  # noqa: D102
        return self._idle.popitem(last=False)[0] if self._idle else None


class Random(_Timeless):
    """Any idle expert; a yardstick."""

    def __init__(self) -> None:
        self._rng = random.Random(0)
        self._idle: list[ExpertKey] = []
        self._at: dict[ExpertKey, int] = {}

    def use(self, key: ExpertKey) -> None:  # noqa: D102
        if key in self._at:
            at, last = self._at.pop(key), self._idle.pop()
            if last != key:
                self._idle[at], self._at[last] = last, at

    def release(self, key: ExpertKey) -> None:  # noqa: D102
        self._at[key] = len(self._idle)
        self._idle.append(key)

    def victim(self) -> ExpertKey | None:  # noqa: D102
        key = self._rng.choice(self._idle) if self._idle else None
        if key is not None:
            self.use(key)
        return key


class _Heap:
    """Idle experts in a heap, smallest rank first; an outdated item is skipped when it comes up."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, ExpertKey]] = []
        self._current: dict[ExpertKey, int] = {}
        self._count = 0

    def add(self, key: ExpertKey, rank: float) -> None:
        self._count += 1
        self._current[key] = self._count
        heapq.heappush(self._heap, (rank, self._count, key))

    def discard(self, key: ExpertKey) -> None:
        self._current.pop(key, None)

    def pop(self) -> ExpertKey | None:
        while self._heap:
            _, count, key = heapq.heappop(self._heap)
            if self._current.get(key) == count:
                del self._current[key]
                return key
        return None


class Lfu(_Timeless):
    """Least frequently used first; counts, kept after eviction, fade to a half in 100 requests a slot."""

    def __init__(self, slots: int) -> None:
        self._idle = _Heap()
        self._growth = 2 ** (1 / (100 * slots))
        self._weight = 1.0
        self._counts: dict[ExpertKey, float] = {}

    def use(self, key: ExpertKey) -> None:  # noqa: D102
        self._idle.discard(key)
        self._weight *= self._growth  # later uses weigh more, which is the same as older ones fading
        self._counts[key] = self._counts.get(key, 0.0) + self._weight

    def release(self, key: ExpertKey) -> None:  # noqa: D102
        self._idle.add(key, self._counts[key])

    def victim(self) -> ExpertKey | None:  # noqa: D102
        return self._idle.pop()


class S3Fifo(_Timeless):
    """Two queues and the names of the lately evicted (Yang et al., SOSP 2023, https://doi.org/10.1145/3600006.3613147)."""

    def __init__(self, slots: int) -> None:
        self._small_size = max(1, slots // 10)
        self._ghosts_size = max(1, slots - self._small_size)
        self._small: deque[ExpertKey] = deque()
        self._main: deque[ExpertKey] = deque()
        self._ghosts: OrderedDict[ExpertKey, None] = OrderedDict()
        self._frequency: dict[ExpertKey, int] = {}
        self._busy: set[ExpertKey] = set()

    def use(self, key: ExpertKey) -> None:  # noqa: D102
        self._busy.add(key)
        if key in self._frequency:
            self._frequency[key] = min(3, self._frequency[key] + 1)
            return
        self._frequency[key] = 0
        if key in self._ghosts:
            del self._ghosts[key]
            self._main.append(key)
        else:
            self._small.append(key)

    def release(self, key: ExpertKey) -> None:  # noqa: D102
        self._busy.discard(key)

    def victim(self) -> ExpertKey | None:  # noqa: D102
        if len(self._busy) == len(self._small) + len(self._main):
            return None
        tried = 0
        while True:
            from_small = len(self._small) >= self._small_size or not self._main
            tried += 1
            if tried > 8 * len(self._frequency) + 8:  # all of the preferred queue is in use
                from_small = not from_small and bool(self._small)
            queue = self._small if from_small else self._main
            if not queue:
                continue
            key = queue.popleft()
            if key in self._busy:
                queue.append(key)
            elif from_small and self._frequency[key] > 1:
                self._main.append(key)
            elif not from_small and self._frequency[key] > 0:
                self._frequency[key] -= 1
                self._main.append(key)
            else:
                del self._frequency[key]
                if from_small:
                    self._ghosts[key] = None
                    if len(self._ghosts) > self._ghosts_size:
                        self._ghosts.popitem(last=False)
                return key


class WTinyLfu(_Timeless):
    """An LRU window before a segmented LRU that lets in what is asked for more often (https://arxiv.org/abs/1512.00727)."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._window_size = max(1, slots // 100)
        self._protected_size = int((slots - self._window_size) * 0.8)
        self._window: OrderedDict[ExpertKey, None] = OrderedDict()
        self._probation: OrderedDict[ExpertKey, None] = OrderedDict()
        self._protected: OrderedDict[ExpertKey, None] = OrderedDict()
        self._busy: set[ExpertKey] = set()
        self._counts: Counter[ExpertKey] = Counter()
        self._sample, self._seen = 10 * slots, 0

    def use(self, key: ExpertKey) -> None:  # noqa: D102
        self._busy.add(key)
        self._count(key)
        if key in self._window:
            self._window.move_to_end(key)
        elif key in self._protected:
            self._protected.move_to_end(key)
        elif key in self._probation:
            del self._probation[key]
            self._protected[key] = None
            if len(self._protected) > self._protected_size:
                self._probation[self._protected.popitem(last=False)[0]] = None
        else:
            self._window[key] = None
            filling = len(self._window) + len(self._probation) + len(self._protected) < self._slots
            if filling and len(self._window) > self._window_size:  # nobody has to leave for it yet
                self._probation[self._window.popitem(last=False)[0]] = None

    def _count(self, key: ExpertKey) -> None:
        self._counts[key] = min(15, self._counts[key] + 1)
        self._seen += 1
        if self._seen >= self._sample:
            self._seen //= 2
            self._counts = Counter({k: c // 2 for k, c in self._counts.items() if c > 1})

    def release(self, key: ExpertKey) -> None:  # noqa: D102
        self._busy.discard(key)

    def victim(self) -> ExpertKey | None:  # noqa: D102
        newcomer = self._first(self._window) if len(self._window) >= self._window_size else None
        resident = self._first(self._probation) or self._first(self._protected)
        if newcomer is None and resident is None:
            newcomer = self._first(self._window)
        if newcomer is not None and resident is not None:
            del self._window[newcomer]
            if self._counts[newcomer] <= self._counts[resident]:
                return newcomer
            self._probation[newcomer] = None
        victim = resident or newcomer
        if victim is not None:
            for segment in (self._window, self._probation, self._protected):
                segment.pop(victim, None)
        return victim

    def _first(self, part: OrderedDict[ExpertKey, None]) -> ExpertKey | None:
        return next((key for key in part if key not in self._busy), None)


class Cycle(_Timeless):
    """From the layer whose next visit is farthest, least used first: encoder once, then decoder again and again."""

    def __init__(self, trace: Sequence[Visit]) -> None:
        layers = sorted({(key.stack == "decoder", key.block) for visit in trace for key in visit})
        self._numbers = {(("decoder" if later else "encoder"), block): n for n, (later, block) in enumerate(layers)}
        self._encoder = sum(not later for later, _ in layers)
        self._idle = [_Heap() for _ in layers]
        self._counts: Counter[ExpertKey] = Counter()
        self._now = 0

    def use(self, key: ExpertKey) -> None:  # noqa: D102
        self._now = self._numbers[key.stack, key.block]
        self._idle[self._now].discard(key)
        self._counts[key] += 1

    def release(self, key: ExpertKey) -> None:  # noqa: D102
        self._idle[self._numbers[key.stack, key.block]].add(key, self._counts[key])

    def victim(self) -> ExpertKey | None:  # noqa: D102
        farthest_first = sorted(range(len(self._idle)), key=self._distance, reverse=True)
        return next((key for number in farthest_first if (key := self._idle[number].pop()) is not None), None)

    def _distance(self, layer: int) -> int:
        if layer > self._now:
            return layer - self._now
        decoder = len(self._idle) - self._encoder
        never_soon = 10**6  # the encoder comes again with the next input only
        return never_soon + layer if layer < self._encoder else decoder - (self._now - layer)


class Belady(_Timeless):
    """Evicts what is needed last, which only one who has seen the future can (Belady 1966)."""

    def __init__(self, trace: Sequence[Visit]) -> None:
        self._uses: dict[ExpertKey, deque[int]] = {}
        for at, visit in enumerate(trace):
            for key in visit:
                self._uses.setdefault(key, deque()).append(at)
        self._idle = _Heap()

    def use(self, key: ExpertKey) -> None:  # noqa: D102
        self._idle.discard(key)
        self._uses[key].popleft()

    def release(self, key: ExpertKey) -> None:  # noqa: D102
        uses = self._uses[key]
        self._idle.add(key, -float(uses[0]) if uses else float("-inf"))

    def victim(self) -> ExpertKey | None:  # noqa: D102
        return self._idle.pop()
