"""The background writer: never in the model's way, and done when it says so."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from switchrun.store import BackgroundWriter
from tests.store.conftest import LAYOUT, data_of, holds, key, open_store


class Held:
    """A store's `write` that waits until it is let go, and counts."""

    def __init__(self, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.keys: list[int] = []
        real = store.write

        def write(name: Any, data: memoryview) -> bool:
            self.entered.set()
            assert self.go.wait(10)
            self.keys.append(name.expert)
            return real(name, data)

        monkeypatch.setattr(store, "write", write)


def offer(writer: BackgroundWriter, number: int) -> bool:
    return writer.offer(key(number), memoryview(data_of(number)))


def test_it_refuses_at_once_when_full_and_flushes_at_close(offload, monkeypatch):
    store = open_store(offload)
    held = Held(store, monkeypatch)
    with BackgroundWriter(store, buffers=2) as writer:
        assert offer(writer, 0)
        assert held.entered.wait(10)
        assert offer(writer, 1)
        assert not offer(writer, 2)
        assert offer(writer, 1)  # it waits already
        assert held.keys == []
        held.go.set()
    assert held.keys == [0, 1]
    assert not offer(writer, 3)
    fresh = open_store(offload)
    assert [fresh.find(key(number)) is not None for number in range(4)] == [True, True, False, False]
    assert holds(fresh, 0)
    assert holds(fresh, 1)


def test_flush_frees_the_buffers(offload):
    store = open_store(offload)
    with BackgroundWriter(store, buffers=1) as writer:
        for number in range(5):
            assert offer(writer, number)
            writer.flush()
            assert holds(store, number)


def test_the_data_is_the_callers_again_at_once(offload, monkeypatch):
    store = open_store(offload)
    held = Held(store, monkeypatch)
    data = bytearray(data_of(0))
    with BackgroundWriter(store) as writer:
        assert writer.offer(key(0), memoryview(data))
        data[:] = bytes(len(data))
        held.go.set()
    assert holds(store, 0)


def test_what_waits_can_be_dropped(offload, monkeypatch):
    store = open_store(offload)
    held = Held(store, monkeypatch)
    writer = BackgroundWriter(store, buffers=3)
    offer(writer, 0)
    assert held.entered.wait(10)
    offer(writer, 1)
    offer(writer, 2)
    closing = threading.Thread(target=writer.close, kwargs={"finish": False})
    closing.start()
    while len(writer._waiting) > 1:
        closing.join(0.001)
    held.go.set()
    closing.join(10)
    assert held.keys == [0]


def test_what_another_process_has_stored_is_not_written_again(offload, monkeypatch):
    store = open_store(offload)
    held = Held(store, monkeypatch)
    held.go.set()
    open_store(offload).write(key(0), data_of(0))
    with BackgroundWriter(store) as writer:
        assert offer(writer, 0)
        assert offer(writer, 1)
    assert held.keys == [1]


def test_no_error_reaches_the_model(offload, monkeypatch):
    warnings: list[str] = []
    store = open_store(offload, warnings)

    def fail(*_: Any) -> bool:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(store, "write", fail)
    with BackgroundWriter(store) as writer:
        assert offer(writer, 0)
        writer.flush()
        assert not offer(writer, 1)
    assert len(warnings) == 1
    assert "RuntimeError: out of luck" in warnings[0]


def test_an_interrupted_offer_does_not_hang_the_flush(offload, monkeypatch):
    with BackgroundWriter(open_store(offload), buffers=1) as writer:
        memory = writer._memory
        monkeypatch.setattr(writer, "_memory", [None])
        with pytest.raises(TypeError):
            offer(writer, 0)
        monkeypatch.setattr(writer, "_memory", memory)
        flushing = threading.Thread(target=writer.flush, daemon=True)
        flushing.start()
        flushing.join(5)
        assert not flushing.is_alive()
        assert offer(writer, 0)


def test_a_buffer_of_another_length_is_a_bug_of_the_caller(offload):
    with BackgroundWriter(open_store(offload)) as writer, pytest.raises(ValueError, match="bytes here, not 5"):
        writer.offer(key(0), memoryview(b"12345"))


def test_closing_twice_is_fine_and_memory_is_stated(offload):
    writer = BackgroundWriter(open_store(offload), buffers=3)
    assert 3 * LAYOUT.nbytes <= writer.buffer_bytes < 3 * (LAYOUT.nbytes + 4096)
    writer.close()
    writer.close()
    assert not writer._thread.is_alive()
