"""Memory that is taken when it is first written."""

from __future__ import annotations

from switchrun.experts.buffers import Buffers, touch
from switchrun.machine import ram
from switchrun.units import MIB

SIZE, COUNT = 8 * MIB, 8


def test_only_what_is_touched_is_resident() -> None:
    before = ram.rss_bytes()
    buffers = Buffers(COUNT, SIZE)
    assert ram.rss_bytes() - before < SIZE
    touch(buffers.view(0)[:0])
    for index in range(COUNT):
        touch(buffers.view(index))
    assert abs(ram.rss_bytes() - before - COUNT * SIZE) < SIZE


def test_a_buffer_is_new_once() -> None:
    buffers = Buffers(2, SIZE)
    assert [buffers.first_use(index) for index in (1, 0, 1, 0)] == [True, True, False, False]
