"""Reads experts from the Hub by byte range, over as many connections as suit the link."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from switchrun.checkpoint.remote import HubRanges
from switchrun.checkpoint.types import RemoteFile
from switchrun.experts.reader import PooledReader, Segment
from switchrun.units import MIB

#: A request for less would wait longer for its answer than receive it; more would leave other connections idle.
_LEAST_PIECE_BYTES, _MOST_PIECE_BYTES = 2 * MIB, 8 * MIB
_FEWEST_CONNECTIONS, _MOST_CONNECTIONS = 8, 32
#: By so much more connections must be faster, or they are given up.
_GAIN = 1.15


class Pace:
    """How many connections are used at a time; learned from what reads took. For any thread.

    A storage may limit what one connection carries, and between two answers it carries nothing. So connections are
    doubled as long as that makes reading faster.
    """

    def __init__(self) -> None:
        self.connections = _FEWEST_CONNECTIONS
        self._lock = threading.Lock()
        self._settled = False
        #: The rate with half as many; 0 before any was measured.
        self._rate = 0.0
        self.restart()

    def restart(self) -> None:
        """Measure from here on: what came before was with other connections, or there was nothing to read."""
        self._ended = self._bytes = 0
        self._start = 0.0

    def note(self, nbytes: int, now: float) -> None:
        """Note that so many bytes have come by one request, which ended `now`, and that others were waiting."""
        with self._lock:
            self._ended += 1
            # One round is left out: connections are being made, and requests of before are still under way.
            if self._ended == self.connections:
                self._start = now
            elif self._ended > self.connections:
                self._bytes += nbytes
            if self._ended == 3 * self.connections:
                self._adapt(self._bytes / max(now - self._start, 1e-6))
                self.restart()

    def _adapt(self, rate: float) -> None:
        if self._settled:
            return
        if self._rate and rate < _GAIN * self._rate:
            self.connections //= 2
            self._settled = True
        elif self.connections == _MOST_CONNECTIONS:
            self._settled = True
        else:
            self.connections *= 2
            self._rate = rate


class HubReader(PooledReader):
    """Reads segments of files of the Hub; owns its threads until `close`, and `ranges` from now on."""

    def __init__(self, ranges: HubRanges) -> None:
        super().__init__(_MOST_CONNECTIONS, "switchrun-hub-reader")
        self._ranges = ranges
        self._pace = Pace()
        self._turn = threading.Condition()
        self._reading = 0

    def segment(self, file: Path | RemoteFile, offset: int, nbytes: int) -> Segment:
        """See `Reader.segment`."""
        return Segment(file, offset, nbytes, 0, nbytes)

    def _piece_bytes(self, nbytes: int) -> int:
        # A single expert is cut finer, so that no connection is idle: in the decoder the model waits for each.
        idle = max(1, self._pace.connections - self.pieces)
        return max(_LEAST_PIECE_BYTES, min(-(-nbytes // idle), _MOST_PIECE_BYTES))

    def _read_piece(self, piece: Segment, target: memoryview) -> None:
        assert isinstance(piece.file, RemoteFile)
        with self._turn:
            self._turn.wait_for(lambda: self._reading < self._pace.connections)
            self._reading += 1
        try:
            self._ranges.read_into(piece.file, piece.offset, target[: piece.needed])
        finally:
            with self._turn:
                self._reading -= 1
                self._turn.notify_all()
        if self.pieces > self._pace.connections:
            self._pace.note(piece.needed, time.monotonic())
        else:
            self._pace.restart()

    def abandon(self) -> None:
        """See `Reader.abandon`; what is asked for afterwards is read again."""
        self._ranges.close()
        self.wait()
        self._ranges = self._ranges.reopened()

    def close(self, drop: bool = False) -> None:
        """See `Reader.close`; with `drop` reads under way are broken off."""
        if drop:
            self._ranges.close()
        super().close(drop)
        self._ranges.close()
