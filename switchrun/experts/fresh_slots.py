"""Slots that have no memory yet, and the thread that takes it for them when the processor has nothing else to do."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from typing import TYPE_CHECKING

from switchrun.experts.pages import HUGE_PAGE_BUFFERS, Pages, touch

if TYPE_CHECKING:
    from switchrun.experts.slot_table import SlotTable

#: With so many slots the reads of a layer follow one another without a gap; opening takes memory for no more.
FEW = 6

#: The thread can be stopped after so many bytes.
_STEP_BYTES = 2 * 1024**2


class FreshSlots:
    """The slots of a cache whose pages are not taken from the system yet.

    New pages can be slower than the disk: 0.4 GB/s on a virtual machine that had given its free memory back to its
    host, whose disk read 3.5 GB/s (2026-11-28). So a thread takes them slot by slot, at the lowest priority there is.
    Meanwhile a slot whose expert may not be needed again is used anew, as those of encoder layers are that the first
    input has passed; and no more reads are begun than keep a disk busy. Slots of less than 4 MiB get their pages from
    whoever fills them first, in no time.

    Args:
        slots: The memory. Its buffers up to `claimed` have their pages.
        wanted: So many slots will be needed soon; for the others no memory is taken ahead.
    """

    def __init__(self, slots: Pages, wanted: int) -> None:
        touched = slots.claimed // slots.size
        # There is always one that the thread leaves alone.
        known = slots.count if slots.size < HUGE_PAGE_BUFFERS else min(slots.count, max(touched, 1))
        self._slots = slots
        self._bare = set(range(touched, slots.count))
        self._fresh = deque(range(known, slots.count))
        self._touched = deque(reversed(range(known)))  # the last one is used first
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(wanted - known,), name="switchrun-touch", daemon=True)
        if self._fresh and wanted > known:
            self._thread.start()

    def take(self, table: SlotTable, in_flight: int) -> int | None:
        """Give a slot that nobody uses, if possible one that has its memory; None if another read must end first.

        Args:
            table: The books of the cache; slots get into them here.
            in_flight: How many reads are under way.
        """
        while self._touched:
            table.add(self._touched.popleft())
        if not table.free and self._thread.is_alive():
            again = table.take(once=True)
            if again is not None or in_flight >= FEW:
                return again
        if not table.free:
            with contextlib.suppress(IndexError):  # the thread may have the last one
                table.add(self._fresh.pop())
        return table.take()

    def fill(self, slot: int) -> bool:
        """Note that a slot is written to; tells whether it has no pages yet."""
        bare = slot in self._bare
        self._bare.discard(slot)
        return bare

    def _run(self, count: int) -> None:
        # An ordinary thread would take half of a core from the products, for seconds; a nice one still does.
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        for _ in range(count):
            try:
                slot = self._fresh.popleft()
            except IndexError:
                return
            view = self._slots.view(slot)
            for start in range(0, len(view), _STEP_BYTES):
                if self._closing.is_set():
                    return
                touch(view[start : start + _STEP_BYTES])
            self._bare.discard(slot)
            self._touched.append(slot)

    def close(self) -> None:
        """End the thread; may be called again."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()
