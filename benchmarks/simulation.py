"""A cache without experts: made-up traces, and what a policy makes of a trace. Used by `eviction.py`."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence

from policies import Policy, Visit

from switchrun.checkpoint.types import ExpertKey, Stack

SEED = 1
STACKS: tuple[Stack, ...] = ("encoder", "decoder")


def synthetic(
    experts: int, requests: int, skew: float, *, layers: int = 15, batch: int = 1, change_every: int = 0
) -> list[Visit]:
    """Make a trace of independent requests of 24 input and 12 output tokens each.

    Args:
        experts: Experts of each layer.
        requests: How many requests.
        skew: Exponent of Zipf's law for the experts' popularity; 0 is uniform.
        layers: Sparse layers of each stack.
        batch: Inputs that run together.
        change_every: Other experts become popular after as many requests; 0 is never.
    """
    rng = random.Random(SEED)
    weights = list(itertools.accumulate((rank + 1) ** -skew for rank in range(experts)))
    orders: dict[tuple[Stack, int], list[int]] = {}
    trace: list[Visit] = []

    def visit(stack: Stack, layer: int, tokens: int) -> None:
        ranks = sorted(set(rng.choices(range(experts), cum_weights=weights, k=tokens)))
        trace.append(tuple(ExpertKey(stack, layer, orders[stack, layer][rank]) for rank in ranks))

    for request in range(requests):
        if not orders or (change_every and request % change_every == 0):
            orders = {(s, n): rng.sample(range(experts), experts) for s in STACKS for n in range(layers)}
        for layer in range(layers):
            visit("encoder", layer, 24 * batch)
        for _, layer in itertools.product(range(12), range(layers)):
            visit("decoder", layer, batch)
    return trace


def simulate(
    policy: Policy,
    trace: Sequence[Visit],
    slots: int,
    watch: Callable[[int, set[ExpertKey]], None] | None = None,
) -> float:
    """Run a trace through a cache that works as `ExpertCache.stream` does.

    `watch` is called before each visit with its number and what is in the cache.

    Returns:
        Hits ÷ requests.
    """
    resident: set[ExpertKey] = set()
    hits = 0
    for number, visit in enumerate(trace):
        if watch is not None:
            watch(number, resident)
        found = [key for key in visit if key in resident]
        missing = deque(key for key in visit if key not in resident)
        hits += len(found)
        policy.begin_visit()
        for key in found:
            policy.use(key)
        arriving = _submit(policy, resident, missing, slots)
        for key in found:
            policy.release(key)
            arriving += _submit(policy, resident, missing, slots)
        while arriving:
            policy.release(arriving.popleft())
            arriving += _submit(policy, resident, missing, slots)
    return hits / sum(map(len, trace))


def _submit(policy: Policy, resident: set[ExpertKey], missing: deque[ExpertKey], slots: int) -> deque[ExpertKey]:
    """Start as many reads as there are slots that nobody uses."""
    started: deque[ExpertKey] = deque()
    while missing:
        if len(resident) >= slots:
            victim = policy.victim()
            if victim is None:
                break
            resident.remove(victim)
        key = missing.popleft()
        policy.use(key)
        resident.add(key)
        started.append(key)
    return started
