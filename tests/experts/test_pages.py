"""Memory that is taken before it is needed, and given back."""

from __future__ import annotations

from switchrun import hardware
from switchrun.experts.pages import Pages, touch
from switchrun.units import MIB

SIZE, COUNT = 8 * MIB, 8


def test_what_is_touched_is_resident_and_what_is_shrunk_is_not() -> None:
    before = hardware.rss_bytes()
    pages = Pages(COUNT, SIZE)
    assert hardware.rss_bytes() - before < SIZE
    assert pages.claim(COUNT * SIZE)
    assert not pages.claim(SIZE)
    touch(pages.view(0)[:0])
    for index in range(COUNT):
        touch(pages.view(index))
    assert abs(hardware.rss_bytes() - before - COUNT * SIZE) < SIZE
    pages.view(0)[:4] = b"kept"
    pages.shrink(2)
    assert (pages.count, pages.claimed) == (2, 2 * SIZE)
    assert abs(hardware.rss_bytes() - before - 2 * SIZE) < SIZE
    assert bytes(pages.view(0)[:4]) == b"kept"
    assert Pages(2, SIZE, pages).view(0)[:4] == b"kept"
