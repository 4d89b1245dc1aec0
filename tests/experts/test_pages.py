"""Memory that is taken before it is needed, and given back."""

from __future__ import annotations

import threading

from switchrun import hardware
from switchrun.experts.pages import Pages, touch
from switchrun.units import MIB

SIZE, COUNT = 8 * MIB, 8


def test_what_is_touched_is_resident_and_what_is_shrunk_is_not() -> None:
    before = hardware.rss_bytes()
    pages = Pages(COUNT, SIZE)
    assert hardware.rss_bytes() - before < SIZE
    pages.touch_first(COUNT, threading.Event())
    assert pages.claimed == COUNT * SIZE
    assert abs(hardware.rss_bytes() - before - COUNT * SIZE) < SIZE
    pages.view(0)[:4] = b"kept"
    pages.shrink(2)
    assert (pages.count, pages.claimed) == (2, 2 * SIZE)
    assert abs(hardware.rss_bytes() - before - 2 * SIZE) < SIZE
    assert bytes(pages.view(0)[:4]) == b"kept"
    assert Pages(2, SIZE, pages).view(0)[:4] == b"kept"


def test_what_is_claimed_is_left_alone_and_the_rest_is_touched() -> None:
    pages = Pages(COUNT, SIZE)
    assert pages.claim(3 * SIZE)
    assert not pages.claim(2 * SIZE)
    for index in range(COUNT):
        pages.view(index)[:4] = pages.view(index)[-4:] = b"mine"
    pages.touch_first(COUNT - 1, threading.Event())
    began = [bytes(pages.view(index)[:4]) for index in range(COUNT)]
    ended = [bytes(pages.view(index)[-4:]) for index in range(COUNT)]
    assert began == ended == [b"mine"] * 3 + [bytes(4)] * (COUNT - 4) + [b"mine"]


def test_buffers_are_claimed_while_others_are_touched() -> None:
    pages, size = Pages(COUNT * 64, SIZE // 64), SIZE // 64
    toucher = threading.Thread(target=pages.touch_first, args=(pages.count, threading.Event()))
    toucher.start()
    mine = [index for index in range(pages.count) if pages.claim((index + 1) * size) and write(pages, index)]
    toucher.join()
    assert all(bytes(pages.view(index)[:4]) == b"mine" for index in mine)
    assert pages.claimed == pages.count * size


def write(pages: Pages, index: int) -> bool:
    pages.view(index)[:4] = b"mine"
    return True


def test_nothing_is_touched_once_it_is_told_to_stop() -> None:
    pages, stop = Pages(COUNT, SIZE), threading.Event()
    stop.set()
    pages.touch_first(COUNT, stop)
    assert pages.claimed == 0
    touch(pages.view(0)[:0])
