"""The eviction policy: only what is idle leaves, everything that is idle can, and rare experts go first."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from switchrun.checkpoint.types import ExpertKey
from switchrun.experts.policy import NextUsePolicy


def key(block: int, expert: int) -> ExpertKey:
    return ExpertKey("encoder", block, expert)


def visit(policy: NextUsePolicy, block: int, *experts: int) -> None:
    policy.begin_visit()
    for expert in experts:
        policy.use(key(block, expert))
    for expert in experts:
        policy.release(key(block, expert))


def drain(policy: NextUsePolicy) -> list[ExpertKey]:
    victims = []
    while (victim := policy.victim()) is not None:
        victims.append(victim)
    return victims


def cyclic_hits(slots: int, layers: int, experts: int, rounds: int) -> int:
    """Run whole layers in a cycle through as many slots, as a cache would."""
    policy = NextUsePolicy()
    resident: set[ExpertKey] = set()
    hits = 0
    for number in range(rounds * layers):
        policy.begin_visit()
        for expert in range(experts):
            wanted = key(number % layers, expert)
            hits += wanted in resident
            if wanted not in resident and len(resident) >= slots:
                victim = policy.victim()
                assert victim is not None
                resident.remove(victim)
            policy.use(wanted)
            policy.release(wanted)
            resident.add(wanted)
    return hits


def test_nothing_idle_is_nothing_to_evict() -> None:
    policy = NextUsePolicy()
    assert policy.victim() is None
    policy.begin_visit()
    policy.use(key(1, 0))
    assert policy.victim() is None


def test_rare_experts_leave_before_frequent_ones() -> None:
    policy = NextUsePolicy()
    for _ in range(3):
        visit(policy, 1, 0, 1)
    visit(policy, 1, 0, 2)
    assert drain(policy) == [key(1, 2), key(1, 1), key(1, 0)]


def test_among_equals_the_layer_just_left_goes_first() -> None:
    policy = NextUsePolicy()
    for _ in range(2):
        for block in (1, 3, 5):
            visit(policy, block, 0)
    assert drain(policy) == [key(5, 0), key(3, 0), key(1, 0)]


def test_layers_that_never_came_back_go_first_and_the_earliest_of_them() -> None:
    policy = NextUsePolicy()
    for block in (1, 3):
        visit(policy, block, 0)
    for _ in range(2):
        visit(policy, 5, 0)
        visit(policy, 7, 1)
    assert drain(policy) == [key(1, 0), key(3, 0), key(7, 1), key(5, 0)]


def test_a_first_fill_reads_no_more_than_with_lru() -> None:
    """An encoder's layers once, then a decoder's in a cycle, one expert each: 12 steps, 2 slots more than layers."""
    policy = NextUsePolicy()
    resident: set[ExpertKey] = set()
    loads = 0
    visits = [(block, range(3)) for block in range(8)] + [(20 + n % 8, (n // 8 % 2,)) for n in range(8 * 12)]
    for block, experts in visits:
        policy.begin_visit()
        for expert in experts:
            wanted = key(block, expert)
            if wanted not in resident:
                loads += 1
                if len(resident) == 10:
                    victim = policy.victim()
                    assert victim is not None
                    resident.remove(victim)
            policy.use(wanted)
            resident.add(wanted)
        for expert in experts:
            policy.release(key(block, expert))
    # LRU would read in every step: each layer's other expert is asked for, then the first again.
    assert loads < 24 + 96


def test_what_is_kept_is_idle_and_counts_stay() -> None:
    policy = NextUsePolicy()
    for _ in range(3):
        visit(policy, 1, 0, 1)
    visit(policy, 1, 2, 3)
    policy.keep([key(1, 0), key(1, 3)])
    assert drain(policy) == [key(1, 3), key(1, 0)]
    policy.keep(())
    assert policy.victim() is None


def test_what_is_never_used_again_fades_but_never_to_nothing() -> None:
    """After 1,100 halvings a float is 0, and elapsed / 0 is no number of visits."""
    policy = NextUsePolicy(fade_visits=1)
    visit(policy, 1, 0)
    visit(policy, 1, 0)
    for _ in range(1500):
        visit(policy, 2, 1)
    assert set(drain(policy)) == {key(1, 0), key(2, 1)}


def test_a_cycle_that_does_not_fit_still_hits() -> None:
    """LRU hits nothing here: with 8 slots, 16 experts come round again and again."""
    assert cyclic_hits(slots=8, layers=4, experts=4, rounds=20) > 0.3 * 20 * 16


def test_one_slot_works() -> None:
    assert cyclic_hits(slots=1, layers=2, experts=2, rounds=5) == 0
    assert cyclic_hits(slots=1, layers=1, experts=1, rounds=5) == 4


def test_counts_survive_eviction_and_fade() -> None:
    policy = NextUsePolicy(fade_visits=8)
    for _ in range(6):
        visit(policy, 1, 0)
    assert policy.victim() == key(1, 0)
    visit(policy, 1, 0)
    visit(policy, 1, 1)
    assert policy.victim() == key(1, 1)
    for _ in range(40):  # the subject changes
        visit(policy, 1, 1)
    assert policy.victim() == key(1, 0)


def test_many_hits_without_an_eviction_take_no_memory() -> None:
    policy = NextUsePolicy()
    for _ in range(2_000):
        visit(policy, 1, 0, 1)
    assert sum(len(layer._heap) for layer in policy._layers.values()) <= 2 * 2 + 64


@settings(max_examples=100, deadline=None)
@given(
    visits=st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 5), min_size=1), st.integers(0, 3))),
    fade=st.integers(2, 20),
)
def test_exactly_the_idle_can_be_evicted_and_each_once(visits: list[tuple[int, set[int], int]], fade: int) -> None:
    policy = NextUsePolicy(fade_visits=fade)
    idle: Counter[ExpertKey] = Counter()
    for block, experts, evictions in visits:
        policy.begin_visit()
        wanted = [key(block, expert) for expert in sorted(experts)]
        for expert in wanted:
            policy.use(expert)
            del idle[expert]
        for _ in range(evictions):
            victim = policy.victim()
            assert (victim is None) == (not idle)
            if victim is not None:
                del idle[victim]
                assert victim not in wanted
        for expert in wanted:
            policy.release(expert)
            idle[expert] = 1
    assert sorted(drain(policy)) == sorted(idle)
