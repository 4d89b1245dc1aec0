"""The expert cache: what it keeps, what it reads, and that it never gives out a slot that is in use."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.types import ExpertKey, SwitchCheckpoint, TensorSlice
from switchrun.dtypes import Dtype
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.cache import ExpertCache
from switchrun.experts.reader import PAGE
from switchrun.experts.source import plan_reads
from switchrun.experts.ways import WAYS
from switchrun.planning import memory
from tests.support.caches import keys, make_cache
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config

NUM_EXPERTS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> SwitchCheckpoint:
    folder = tmp_path_factory.mktemp("cache") / "model"
    model = random_model(tiny_config(num_experts=NUM_EXPERTS))
    return open_checkpoint(str(save_checkpoint(model, folder)), cache_dir=folder / "index")


def idle(cache: ExpertCache) -> set[ExpertKey]:
    """Give the experts that the cache could evict."""
    return {key for layer in cache._table.policy._layers.values() for key in layer.idle}


def stored(tensor: TensorSlice) -> torch.Tensor:
    data = bytearray(tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes])
    return torch.frombuffer(data, dtype=torch.float32).view(tensor.shape)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3, 16])
def test_every_expert_arrives_once_with_its_own_bytes(checkpoint: SwitchCheckpoint, slots: int, direct: bool) -> None:
    with make_cache(checkpoint, slots, direct=direct) as cache:
        seen = []
        for key, weights in cache.stream(keys(*range(NUM_EXPERTS))):
            seen.append(key)
            assert torch.equal(weights.wi, stored(checkpoint.experts[key].wi))
            assert torch.equal(weights.wo, stored(checkpoint.experts[key].wo))
        assert sorted(seen) == keys(*range(NUM_EXPERTS))


@pytest.mark.parametrize("slots", [1, 2, 16])
def test_experts_are_converted_on_their_way(checkpoint: SwitchCheckpoint, slots: int) -> None:
    with make_cache(checkpoint, slots, Dtype.BF16) as cache:
        for key, weights in cache.stream(keys(*range(NUM_EXPERTS))):
            assert weights.wi.dtype is torch.bfloat16
            assert torch.equal(weights.wi, stored(checkpoint.experts[key].wi).bfloat16())
            assert torch.equal(weights.wo, stored(checkpoint.experts[key].wo).bfloat16())


def test_what_is_in_memory_comes_first_and_is_not_read_again(checkpoint: SwitchCheckpoint) -> None:
    with make_cache(checkpoint, 4) as cache:
        list(cache.stream(keys(1, 2)))
        order = [key.expert for key, _ in cache.stream(keys(5, 2, 1))]
        assert set(order[:2]) == {1, 2}
        assert order[2] == 5
        counters = cache.counters()
        assert (counters.requests, counters.hits, counters.loads) == (5, 2, 3)
        assert counters.load_bytes == 3 * checkpoint.expert_bytes


def test_the_least_recently_used_expert_leaves(checkpoint: SwitchCheckpoint) -> None:
    with make_cache(checkpoint, 3) as cache:
        for expert in (0, 1, 2, 0, 3):  # 1 is the oldest when 3 comes
            list(cache.stream(keys(expert)))
        before = cache.counters()
        for expert in (0, 2, 3):
            list(cache.stream(keys(expert)))
        assert cache.counters().since(before).loads == 0
        list(cache.stream(keys(1)))
        assert cache.counters().since(before).loads == 1


def test_an_expert_in_use_is_never_overwritten(checkpoint: SwitchCheckpoint) -> None:
    """With two slots and one of them being looked at, eight experts pass through the other one."""
    with make_cache(checkpoint, 2) as cache:
        list(cache.stream(keys(0)))
        stream = cache.stream(keys(0, 1, 2, 3))
        key, weights = next(stream)
        assert key == keys(0)[0]
        expected = weights.wi.clone()
        cache._reader.close()  # waits until the read that was submitted beside it has ended
        assert torch.equal(weights.wi, expected)
        assert torch.equal(expected, stored(checkpoint.experts[key].wi))
        stream.close()


def test_a_stream_that_is_left_early_leaves_nothing_in_use(checkpoint: SwitchCheckpoint) -> None:
    with make_cache(checkpoint, 2) as cache:
        stream = cache.stream(keys(0, 1, 2))
        next(stream)
        stream.close()
        assert len(list(cache.stream(keys(3, 4, 5, 6)))) == 4


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=1, unique=True), min_size=1, max_size=12),
    slots=st.integers(1, NUM_EXPERTS),
)
def test_counters_agree_with_what_is_resident(
    checkpoint: SwitchCheckpoint, requests: list[list[int]], slots: int
) -> None:
    """Between calls, at most `slots` experts are there, hits were there, and all others were read once."""
    with make_cache(checkpoint, slots) as cache:
        resident: set[ExpertKey] = set()
        for request in requests:
            wanted = keys(*request)
            before = cache.counters()
            assert {key for key, _ in cache.stream(wanted)} == set(wanted)
            counted = cache.counters().since(before)
            assert counted.hits == len(resident & set(wanted))
            assert counted.loads == len(wanted) - counted.hits
            assert counted.load_bytes == counted.loads * checkpoint.expert_bytes
            resident = set(cache._table.entries)
            assert len(resident) <= slots
            assert idle(cache) == resident


class Stop(BaseException):
    """As a signal's exception, it may come anywhere."""


@pytest.mark.parametrize("where", ["before the read", "while it is being cut into pieces", "after an arrival"])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.BF16])
def test_a_signal_in_the_middle_neither_hangs_nor_loses_slots(
    checkpoint: SwitchCheckpoint, monkeypatch: pytest.MonkeyPatch, where: str, slots: int, dtype: Dtype
) -> None:
    def stop(*_: object) -> None:
        raise Stop

    with make_cache(checkpoint, slots, dtype) as cache:
        list(cache.stream(keys(0)))
        with monkeypatch.context() as patched:
            if where == "before the read":
                cache.on_load = stop
            elif where == "while it is being cut into pieces":
                patched.setattr(cache._reader._pool, "submit", stop)
            else:
                arrive = cache._next_arrival
                patched.setattr(cache, "_next_arrival", lambda: stop(arrive()))
            with pytest.raises(Stop):
                list(cache.stream(keys(1, 2, 3)))
        cache.on_load = None
        for _ in range(2):
            seen = {key: weights.wi.clone() for key, weights in cache.stream(keys(*range(NUM_EXPERTS)))}
            assert sorted(seen) == keys(*range(NUM_EXPERTS))
            for key, wi in seen.items():
                assert torch.equal(wi, stored(checkpoint.experts[key].wi).to(wi.dtype))
        assert len(cache._table.free) + len(cache._table.entries) == slots
        assert idle(cache) == set(cache._table.entries)
        before = cache.counters().load_seconds
        list(cache.stream(list(cache._table.entries)))
        assert cache._busy == 0
        assert cache.counters().load_seconds == before  # nothing was read, so no time was spent on reading


def test_a_stream_may_outlive_its_cache(checkpoint: SwitchCheckpoint) -> None:
    """As it does when Ctrl-C stops a fill: the traceback keeps the stream until long after the session is closed."""
    with make_cache(checkpoint, 2) as cache:
        stream = cache.stream(keys(0, 1, 2))
        next(stream)
    stream.close()


@pytest.mark.parametrize("direct", [False, True])
def test_a_file_that_ends_too_early_is_named_and_the_cache_goes_on(tmp_path: Path, direct: bool) -> None:
    model = random_model(tiny_config(num_experts=4))
    folder = save_checkpoint(model, tmp_path / "model")
    opened = open_checkpoint(str(folder), cache_dir=tmp_path / "index")
    last = max(opened.experts, key=lambda key: opened.experts[key].wo.offset)
    others = [key for key in opened.experts if key.stack == last.stack and key != last]
    os.truncate(folder / "model.safetensors", opened.experts[last].wo.offset + 4)
    with make_cache(opened, 2, direct=direct) as cache:
        with pytest.raises(CorruptCheckpointError, match=r"model\.safetensors ends at byte \d+, inside a tensor"):
            list(cache.stream([last]))
        assert len(list(cache.stream(others[:1]))) == 1


def test_a_filesystem_that_refuses_direct_reads_is_read_through_the_page_cache(
    checkpoint: SwitchCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv
    refused = []

    def refuse_direct(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(offset)
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refuse_direct)
    with make_cache(checkpoint, 3, direct=True) as cache:
        for key, weights in cache.stream(keys(*range(NUM_EXPERTS))):
            assert torch.equal(weights.wi, stored(checkpoint.experts[key].wi))
        assert refused
        assert not cache.reads_past_page_cache


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    model = random_model(tiny_config(num_experts=2))
    folder = save_checkpoint(model, tmp_path / "model")
    opened = open_checkpoint(str(folder), cache_dir=tmp_path / "index")
    (folder / "model.safetensors").unlink()
    with make_cache(opened, 2) as cache, pytest.raises(CorruptCheckpointError, match="cannot open"):
        list(cache.stream(list(opened.experts)[:1]))


def tensor_at(offset: int, nbytes: int, file: str = "a") -> TensorSlice:
    return TensorSlice(Path("/" + file), offset, nbytes, "BF16", (nbytes // 2,))


@settings(max_examples=200, deadline=None)
@given(
    wi=st.tuples(st.integers(0, 10**6), st.integers(1, 3 * WAYS[0].chunk_bytes // 2)),
    gap=st.integers(-1, 3 * PAGE),
    wo_bytes=st.integers(1, 10**6),
    direct=st.booleans(),
    swapped=st.booleans(),
)
def test_read_plans_hold_both_matrices_and_fit_into_a_slot(
    wi: tuple[int, int], gap: int, wo_bytes: int, direct: bool, swapped: bool
) -> None:
    from switchrun.checkpoint.types import ExpertSlices

    first = tensor_at(*wi)
    second = tensor_at(0, wo_bytes, "b") if gap < 0 else tensor_at(first.offset + first.nbytes + gap, wo_bytes)
    slices = ExpertSlices(second, first) if swapped else ExpertSlices(first, second)
    plan = plan_reads(slices, direct)
    size = memory.read_buffer_bytes(slices.wi.nbytes, slices.wo.nbytes)
    taken: set[tuple[int, int]] = set()
    for segment in plan.segments:
        assert segment.position + segment.length <= size
        assert all(segment.position >= end or segment.position + segment.length <= start for start, end in taken)
        taken.add((segment.position, segment.position + segment.length))
        if direct:
            assert segment.offset % PAGE == segment.length % PAGE == segment.position % PAGE == 0
    for tensor, at in zip(slices, plan.positions, strict=True):
        inside = [s for s in plan.segments if s.file == tensor.file and s.position <= at < s.position + s.length]
        assert len(inside) == 1
        assert at - inside[0].position == tensor.offset - inside[0].offset
        assert at + tensor.nbytes <= inside[0].position + inside[0].needed
    assert len(plan.segments) == (1 if 0 <= gap <= (PAGE if direct else 0) else 2)
