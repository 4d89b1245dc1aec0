"""Slots without memory: who takes it, and which slots are used meanwhile."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.types import ExpertKey, SwitchCheckpoint
from switchrun.experts import fresh_slots
from switchrun.experts.cache import ExpertCache
from switchrun.experts.fresh_slots import FEW, FreshSlots
from switchrun.experts.pages import Pages
from switchrun.experts.slot_table import SlotTable
from switchrun.units import MIB
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config

SIZE, COUNT, NUM_EXPERTS = 4 * MIB, 10, 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> SwitchCheckpoint:
    folder = tmp_path_factory.mktemp("fresh") / "model"
    config = tiny_config(num_experts=NUM_EXPERTS, num_sparse_encoder_layers=2)
    return open_checkpoint(str(save_checkpoint(random_model(config), folder)), cache_dir=folder / "index")


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let no slot be touched until the event is set."""
    event, touch = threading.Event(), fresh_slots.touch

    def wait(memory: memoryview) -> None:
        assert event.wait(60)
        touch(memory)

    monkeypatch.setattr(fresh_slots, "touch", wait)
    yield event
    event.set()


def layer(checkpoint: SwitchCheckpoint, number: int) -> list[ExpertKey]:
    blocks = sorted({(key.stack, key.block) for key in checkpoint.experts})
    return sorted(key for key in checkpoint.experts if (key.stack, key.block) == blocks[number])


def open_cache(checkpoint: SwitchCheckpoint) -> ExpertCache:
    slots = FreshSlots(Pages(COUNT, SIZE), 1000)
    return ExpertCache(checkpoint.experts, torch.float32, COUNT, SIZE, direct=False, slots=slots)


def test_a_cache_makes_do_with_few_slots_while_the_others_have_no_memory(
    checkpoint: SwitchCheckpoint, stuck: threading.Event
) -> None:
    with open_cache(checkpoint) as cache:
        most = 0

        def note(*_: object) -> None:
            nonlocal most
            most = max(most, cache._in_flight)

        cache.on_load = note
        for number in (0, 1):  # the second layer's experts take the place of the first one's
            wanted = layer(checkpoint, number)
            assert sorted(key for key, _ in cache.stream(wanted)) == wanted
            assert {key.block for key in cache._table.entries} == {wanted[0].block}
            assert len(cache._table.slots) == most == FEW
        stuck.set()
        cache._fresh._thread.join()
        for _ in range(2):  # both layers have been visited before, so that there is nothing to gain
            for number in (0, 1):
                list(cache.stream(layer(checkpoint, number)[:4]))
        before = cache.counters()
        assert len(cache._table.slots) == COUNT
        for number in (0, 1):
            list(cache.stream(layer(checkpoint, number)[:4]))
        assert cache.counters().since(before).loads == 0


def test_experts_of_a_layer_that_comes_again_are_not_given_up(
    checkpoint: SwitchCheckpoint, stuck: threading.Event
) -> None:
    with open_cache(checkpoint) as cache:
        for _ in range(2):
            list(cache.stream(layer(checkpoint, 0)[:3]))
        for _ in range(2):
            list(cache.stream(layer(checkpoint, 1)[:3]))
        assert cache.counters().loads == 6
        assert len(cache._table.slots) == 6
        stuck.set()


def test_what_was_read_is_not_touched_and_arrives_whole(checkpoint: SwitchCheckpoint) -> None:
    for _ in range(20):
        with open_cache(checkpoint) as cache:
            for number in (0, 1):
                for key, weights in cache.stream(layer(checkpoint, number)):
                    data = key_bytes(checkpoint, key)
                    assert isinstance(weights.wi, torch.Tensor)
                    assert torch.equal(weights.wi.flatten(), data)


def key_bytes(checkpoint: SwitchCheckpoint, key: ExpertKey) -> torch.Tensor:
    wi = checkpoint.experts[key].wi
    data = bytearray(Path(wi.file).read_bytes()[wi.offset : wi.offset + wi.nbytes])
    return torch.frombuffer(data, dtype=torch.float32)


def test_no_more_is_touched_than_is_wanted() -> None:
    pages = Pages(COUNT, SIZE)
    pages.claim(SIZE + 1)  # the second slot is in use, though it may have no pages
    pages.view(0)[:4] = pages.view(0)[-4:] = pages.view(1)[:4] = pages.view(1)[-4:] = b"mine"
    fresh = FreshSlots(pages, 5)
    fresh._thread.join()
    assert [bytes(pages.view(slot)[part]) for slot in (0, 1) for part in (slice(4), slice(-4, None))] == [b"mine"] * 4
    assert fresh.nbytes == SIZE + 1 + 3 * SIZE
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages.memory))
    whole = SIZE // mmap.PAGESIZE
    # Neighbours may share a huge page.
    assert [resident_pages(start + slot * SIZE, SIZE) for slot in (2, 3, 4, 6, 7)] == [whole] * 3 + [0] * 2
    table = SlotTable(0)
    slots = [slot for _ in range(COUNT) if (slot := fresh.take(table, 0)) is not None]
    assert fresh.take(table, 0) is None
    assert sorted(slots[:5]) == list(range(5))
    assert sorted(slots[5:]) == list(range(5, COUNT))
    assert [fresh.fill(slot) for slot in sorted(slots)] == [False, True] + [False] * 3 + [True] * (COUNT - 5)
    assert not fresh.fill(COUNT - 1)


def resident_pages(address: int, length: int) -> int:
    """Count the pages of a range that are in memory: those that the kernel has a frame for."""
    count = length // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        data = os.pread(file.fileno(), 8 * count, address // mmap.PAGESIZE * 8)
    return sum(data[at + 7] >> 7 for at in range(0, len(data), 8))


def test_what_was_given_back_is_never_taken(stuck: threading.Event) -> None:
    """The thread has one of those slots in hand meanwhile, and gives it back itself."""
    pages = Pages(COUNT, SIZE)
    pages.claim(5 * SIZE)
    fresh = FreshSlots(pages, COUNT)
    while len(fresh._fresh) == COUNT - 5:
        time.sleep(0.001)
    fresh.shrink(3)
    stuck.set()
    fresh._thread.join()
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages.memory))
    assert resident_pages(start + 4 * SIZE, (COUNT - 4) * SIZE) == 0
    table = SlotTable(0)
    assert [fresh.take(table, 0) for _ in range(4)] == [0, 1, 2, None]


def test_closing_waits_for_nothing(stuck: threading.Event) -> None:
    fresh = FreshSlots(Pages(COUNT, SIZE), COUNT)
    fresh.close()
    assert fresh._thread.is_alive()
    stuck.set()
    fresh._thread.join(60)
    assert not fresh._thread.is_alive()
    assert len(fresh._fresh) == COUNT - 2


def test_small_slots_are_used_at_once() -> None:
    fresh = FreshSlots(Pages(COUNT, SIZE // 2), COUNT)
    table = SlotTable(0)
    assert [fresh.take(table, FEW) for _ in range(COUNT)] == list(range(COUNT))
    assert not fresh._thread.is_alive()
    fresh.close()
