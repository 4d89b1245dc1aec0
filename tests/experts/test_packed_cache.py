"""The cache with packed experts: from the store or out of the checkpoint, and never anything but the right ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.types import ExpertKey, SwitchCheckpoint
from switchrun.dtypes import Dtype, PackedDtype, Precision
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.buffers import Buffers
from switchrun.experts.cache import ExpertCache
from switchrun.experts.formats import PackedFormat
from switchrun.experts.reader import FileReader
from switchrun.experts.source import ExpertSource
from switchrun.kernels.matrices import ExpertWeights, Int8Matrix
from switchrun.planning import memory
from switchrun.store import BackgroundWriter, ExpertStore, expert_path
from switchrun.store.manifest import Manifest
from tests.experts.test_cache import Stop, idle, keys, stored
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config

NUM_EXPERTS = 8
INT8 = Precision(Dtype.FP32, PackedDtype.INT8)

Open = Callable[..., tuple[ExpertCache, ExpertStore]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> SwitchCheckpoint:
    folder = tmp_path_factory.mktemp("packed") / "model"
    model = random_model(tiny_config(num_experts=NUM_EXPERTS))
    return open_checkpoint(str(save_checkpoint(model, folder)), cache_dir=folder / "index")


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def opened(checkpoint: SwitchCheckpoint, tmp_path: Path, warnings: list[str]) -> Iterator[Open]:
    """Give a function that opens a cache of so many slots over the same store."""
    with ExitStack() as stack:

        def make(slots: int, direct: bool = False) -> tuple[ExpertCache, ExpertStore]:
            layout = memory.packed_layout(checkpoint, PackedDtype.INT8)
            store = ExpertStore(tmp_path / "tier", Manifest("m", "f", "int8", layout), warn=warnings.append)
            writer = stack.enter_context(BackgroundWriter(store, NUM_EXPERTS))
            cache = ExpertCache(
                PackedFormat(ExpertSource(checkpoint.experts, direct), store, writer),
                slots=Buffers(slots, memory.slot_bytes(checkpoint, INT8)),
                staging=Buffers(
                    memory.STAGING_BUFFERS, memory.staging_bytes(checkpoint, INT8) // memory.STAGING_BUFFERS
                ),
                reader=FileReader(direct),
            )
            stack.callback(writer.flush)
            return stack.enter_context(cache), store

        yield make


def check(checkpoint: SwitchCheckpoint, key: ExpertKey, weights: ExpertWeights) -> None:
    for matrix, slices in zip((weights.wi, weights.wo), checkpoint.experts[key], strict=True):
        assert isinstance(matrix, Int8Matrix)
        back = matrix.codes * (matrix.scb / 127).unsqueeze(1)
        assert torch.allclose(back, stored(slices), atol=float(matrix.scb.max()) / 250)


def wait_for(cache: ExpertCache, store: ExpertStore, *wanted: ExpertKey) -> None:
    """Wait until the writer is idle: it notes an expert in its books a moment after the file is there."""
    assert isinstance(cache._format, PackedFormat)
    assert cache._format._writer is not None
    cache._format._writer.flush()
    assert all(expert_path(store.folder, key).exists() for key in wanted)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 3, 16])
def test_every_expert_arrives_from_either_tier(
    checkpoint: SwitchCheckpoint, opened: Open, warnings: list[str], slots: int, direct: bool
) -> None:
    cache, store = opened(slots, direct)
    wanted = keys(*range(NUM_EXPERTS))
    for stored_before in (keys(), keys(1, 2, 5), wanted):
        for key in set(wanted) - set(stored_before):
            expert_path(store.folder, key).unlink(missing_ok=True)
            store._forget(key)
            cache._reader.forget(expert_path(store.folder, key))
        cache.clear()
        before = cache.counters()
        for key, weights in cache.stream(wanted):
            check(checkpoint, key, weights)
        counted = cache.counters().since(before)
        assert counted.loads == NUM_EXPERTS
        if not direct:
            packed = len(stored_before)
            other = (NUM_EXPERTS - packed) * checkpoint.expert_bytes
            assert counted.load_bytes == packed * store.layout.nbytes + other
        wait_for(cache, store, *wanted)
    assert not warnings


@pytest.mark.parametrize("slots", [1, 2, 16])
def test_damaged_and_vanished_experts_come_from_the_checkpoint(
    checkpoint: SwitchCheckpoint, opened: Open, warnings: list[str], slots: int
) -> None:
    cache, store = opened(slots)
    wanted = keys(*range(NUM_EXPERTS))
    list(cache.stream(wanted))
    wait_for(cache, store, *wanted)
    fresh, again = opened(slots)
    damaged, vanished, *_ = wanted
    path = expert_path(again.folder, damaged)
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert again.find(vanished) is not None
    expert_path(again.folder, vanished).unlink()
    for key, weights in fresh.stream(wanted):
        check(checkpoint, key, weights)
    counted = fresh.counters()
    assert (counted.loads, counted.requests, counted.hits) == (NUM_EXPERTS, NUM_EXPERTS, 0)
    assert idle(fresh) == set(fresh._table.entries)
    assert sum("is damaged" in warning for warning in warnings) == len(warnings) == 1
    wait_for(fresh, again, damaged, vanished)


@pytest.mark.parametrize("direct", [False, True])
def test_a_link_or_a_fifo_that_is_put_there_before_the_read(
    checkpoint: SwitchCheckpoint, opened: Open, warnings: list[str], tmp_path: Path, direct: bool
) -> None:
    """The store has seen a file of the right size; when it is opened for its data, something else has its name."""
    cache, store = opened(2, direct)
    wanted = keys(0, 1)
    list(cache.stream(wanted))
    wait_for(cache, store, *wanted)
    fresh, again = opened(2, direct)
    paths = [expert_path(again.folder, key) for key in wanted]

    def exchange(*_: object) -> None:
        fresh.on_load = None
        for path in paths:
            path.rename(tmp_path / path.name)
        paths[0].symlink_to(tmp_path / paths[0].name)
        os.mkfifo(paths[1])

    fresh.on_load = exchange
    assert [stored for key in wanted if (stored := again.expect(key))]
    for key, weights in fresh.stream(wanted):
        check(checkpoint, key, weights)
    assert len(warnings) == 2
    assert sum("it is a link, not a file" in warning for warning in warnings) == 1
    assert all((tmp_path / path.name).is_file() for path in paths)


@pytest.mark.parametrize("where", ["before the read", "while it is being cut into pieces", "after an arrival"])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("stored_before", [False, True])
def test_a_signal_in_the_middle_leaves_all_in_order(
    checkpoint: SwitchCheckpoint,
    opened: Open,
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    slots: int,
    stored_before: bool,
) -> None:
    def stop(*_: object) -> None:
        raise Stop

    cache, store = opened(slots)
    if stored_before:
        list(cache.stream(keys(0, 1, 2, 3)))
        wait_for(cache, store, *keys(0, 1, 2, 3))
        cache.clear()
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
    for key, weights in cache.stream(keys(*range(NUM_EXPERTS))):
        check(checkpoint, key, weights)
    assert len(cache._table.free) + len(cache._table.entries) == slots
    assert idle(cache) == set(cache._table.entries)
    assert cache._busy == 0
    assert not warnings


def test_a_checkpoint_that_cannot_be_read_is_an_error(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, store = opened(2)
    list(cache.stream(keys(0)))
    wait_for(cache, store, *keys(0))
    cache.clear()

    def refuse(*_: object) -> None:
        raise CorruptCheckpointError("gone")

    monkeypatch.setattr(cache._reader, "_read_piece", refuse)
    for expert in (0, 1):
        with pytest.raises(CorruptCheckpointError, match="gone"):
            list(cache.stream(keys(expert)))
    assert len(cache._table.free) == 2
