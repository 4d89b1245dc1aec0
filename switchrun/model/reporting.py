"""Tells a session's callback how far it is: at each step, and in between, when one takes long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from switchrun.checkpoint.steps import Stage, Steps
from switchrun.model.records import Progress, ProgressCallback

if TYPE_CHECKING:
    from switchrun.checkpoint.remote import HubRanges

#: How often the callback is called in the middle of a step: a layer from the Hub may take minutes.
BEAT_SECONDS = 0.5


class Reporter(Steps):
    """Makes a `Progress` of each step, and hands it to a callback; to nobody if that is None. For any thread.

    Attributes:
        read_bytes: Returns how many bytes of experts have been read.
    """

    def __init__(self, callback: ProgressCallback | None = None) -> None:
        self.read_bytes: Callable[[], int] = lambda: 0
        self._callback = callback
        self._hub: HubRanges | None = None
        self._ids: tuple[int, ...] = ()
        self._last: tuple[Stage, int, int] | None = None
        # Else what one thread has seen could be told after what another one has seen later.
        self._lock = threading.RLock()

    def reads(self, hub: HubRanges) -> None:
        """See `Steps.reads`."""
        self._hub = hub

    def __call__(self, stage: Stage, done: int = 0, total: int = 0) -> None:
        """See `Steps`."""
        if self._callback is not None:
            with self._lock:
                self._last = stage, done, total
                self._tell()

    def _tell(self) -> None:
        if self._callback is not None and self._last is not None:
            stage, done, total = self._last
            # Whole files are downloaded past what reads ranges.
            fetched = done if stage == "download" else 0 if self._hub is None else self._hub.traffic.bytes
            self._callback(Progress(stage, done, total, self.read_bytes(), fetched, self._ids))

    @contextmanager
    def working(self, ids: tuple[int, ...] = ()) -> Iterator[None]:
        """Repeat the last step, with what has been read since, for as long as the block runs; from another thread.

        `ids` are those of the inputs that are worked on.
        """
        if self._callback is None:
            yield
            return
        self._ids, self._last = ids, None
        ended = threading.Event()

        def beat() -> None:
            with suppress(Exception):  # if it fails, the thread that works hears of it at the next step
                while not ended.wait(BEAT_SECONDS):
                    with self._lock:
                        self._tell()

        thread = threading.Thread(target=beat, name="switchrun-progress", daemon=True)
        with suppress(RuntimeError):  # the system allows no more threads: then each step has to do
            thread.start()
        try:
            yield
        finally:
            ended.set()
            if thread.ident is not None:
                thread.join(BEAT_SECONDS)
