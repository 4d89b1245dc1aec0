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

#: With so many slots the reads of a layer follow one another without a gap.
FEW = 6

#: Between two such steps the thread holds Python's lock for a moment. On a busy machine it may be a second until it is
#: its turn again, so there should be few of them.
_STEP_BYTES = 16 * 1024**2


class FreshSlots:
    """The slots of a cache, and a thread that takes their pages from the system while a core is idle.

    New pages can be slower than the disk: 0.4 GB/s on a virtual machine that had given its free memory back to its
    host, whose disk read 3.5 GB/s (2026-11-28). A thread of ordinary priority, or a nice one, took the time from
    importing and from the products. Until slots have their pages, those whose expert may not be needed again are used
    anew, as those of encoder layers are that the first input has passed; and no more reads are begun than keep a disk
    busy. Slots of less than 4 MiB get their pages from whoever fills them first, in no time.

    Nobody ever waits for the thread, for on a busy machine that would take seconds.

    Args:
        pages: The memory. What is claimed of it is in use until the first `take`.
        wanted: So many slots will be needed soon; for the others no memory is taken ahead.

    Attributes:
        pages: The memory.
    """

    def __init__(self, pages: Pages, wanted: int) -> None:
        self.pages = pages
        self._bare = set(range(pages.claimed // pages.size, pages.count))
        # There is always one that the thread leaves alone.
        known = min(pages.count, max(-(-pages.claimed // pages.size), 1))
        if pages.size < HUGE_PAGE_BUFFERS:
            known = pages.count
        self._usable = deque(reversed(range(known)))  # the last one is used first
        self._fresh = deque(range(known, pages.count))
        self._touched_bytes = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(wanted - known,), name="switchrun-touch", daemon=True)
        if self._fresh and wanted > known:
            self._thread.start()

    @property
    def nbytes(self) -> int:
        """How much of the memory is resident, if what is claimed is; not after the first `take`."""
        return self.pages.claimed + self._touched_bytes

    def shrink(self, count: int) -> None:
        """Give the memory of all slots but the first ones back to the system; before the first `take`."""
        self.pages.shrink(count)
        with contextlib.suppress(IndexError):  # the thread has taken the last one meanwhile
            while self._fresh and self._fresh[-1] >= count:
                self._fresh.pop()

    def take(self, table: SlotTable, in_flight: int) -> int | None:
        """Give a slot that nobody uses, if possible one that has its memory; None if another read must end first.

        Args:
            table: The books of the cache; slots get into them here.
            in_flight: How many reads are under way.
        """
        while self._usable:
            slot = self._usable.popleft()
            if slot < self.pages.count:
                table.add(slot)
        if not table.free and self._thread.is_alive():
            again = table.take(once=True)
            if again is not None or in_flight >= FEW:
                return again
        if not table.free:
            with contextlib.suppress(IndexError):  # there is none, or the thread has the last one
                table.add(self._fresh.pop())
        return table.take()

    def fill(self, slot: int) -> bool:
        """Note that a slot is written to; tells whether it may have no pages yet."""
        bare = slot in self._bare
        self._bare.discard(slot)
        return bare

    def _run(self, count: int) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        for _ in range(count):
            try:
                slot = self._fresh.popleft()
            except IndexError:
                return  # the others have been taken as they are
            view = self.pages.view(slot)
            for start in range(0, len(view), _STEP_BYTES):
                step = view[start : start + _STEP_BYTES]
                touch(step)
                self._touched_bytes += len(step)
                if self._closing.is_set():
                    return
            self._bare.discard(slot)
            self._usable.append(slot)
            if slot >= self.pages.count:  # given back while it was being touched
                self.pages.shrink(self.pages.count)

    def close(self) -> None:
        """Have the thread end soon; may be called again. The memory goes when it has, and the last view of it."""
        self._closing.set()
