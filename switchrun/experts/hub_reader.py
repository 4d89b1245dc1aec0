"""Reads experts from the Hub by byte range, in pieces as large and as many at a time as suit the link."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from switchrun.checkpoint.remote import HubRanges
from switchrun.checkpoint.types import RemoteFile
from switchrun.experts.reader import PooledReader, Segment
from switchrun.units import MIB

_LEAST_PIECE_BYTES, _MOST_PIECE_BYTES = 8 * MIB, 64 * MIB
_FEWEST_CONNECTIONS, _MOST_CONNECTIONS = 8, 32
#: Of the time of a request, what may pass before its answer begins: with more, pieces are made larger.
_WAITING_SHARE = 0.1
#: By so much more connections must be faster, or they are given up.
_GAIN = 1.15


class Pace:
    """How large pieces are, and how many are read at a time; learned from what reads took. For any thread.

    Each answer begins a round trip after its request, in which a connection carries nothing: pieces grow until that is
    a tenth of the time. A storage may limit what a connection carries: connections are added as long as that helps.
    """

    def __init__(self) -> None:
        self.piece_bytes = _LEAST_PIECE_BYTES
        self.connections = _FEWEST_CONNECTIONS
        self._lock = threading.Lock()
        self._settled = False
        #: The rate with the last number of connections; 0 before any was measured.
        self._rate = 0.0
        self._fewer = _FEWEST_CONNECTIONS
        self.restart()

    def restart(self) -> None:
        """Begin to measure anew: there was a moment with nothing to read."""
        self._start: float | None = None
        self._pieces = self._bytes = 0
        self._waited = self._seconds = 0.0

    def note(self, nbytes: int, waited: float, seconds: float, now: float) -> None:
        """Note what one piece took: `waited` of its `seconds` passed before answers began; it ended `now`."""
        with self._lock:
            if self._start is None:
                self._start = now  # the first one's bytes came before
                return
            self._pieces += 1
            self._bytes += nbytes
            self._waited += waited
            self._seconds += seconds
            if self._pieces >= 2 * self.connections:
                self._adapt(self._bytes / max(now - self._start, 1e-6))
                self.restart()

    def _adapt(self, rate: float) -> None:
        if self._waited > _WAITING_SHARE * self._seconds and self.piece_bytes < _MOST_PIECE_BYTES:
            self.piece_bytes *= 2
            return  # what more connections would gain is seen once pieces are large enough
        if self._settled:
            return
        if self._rate and rate < _GAIN * self._rate:
            self.connections, self._settled = self._fewer, True
        elif self.connections == _MOST_CONNECTIONS:
            self._settled = True
        else:
            self._rate, self._fewer = rate, self.connections
            self.connections = min(self.connections * 2, _MOST_CONNECTIONS)


class HubReader(PooledReader):
    """Reads segments of files of the Hub; owns its threads until `close`, and `ranges` from now on."""

    def __init__(self, ranges: HubRanges) -> None:
        super().__init__(_MOST_CONNECTIONS, "switchrun-hub-reader")
        self._ranges = ranges
        self._pace = Pace()
        self._turn = threading.Condition()
        #: Pieces that are being read, and those that wait for their turn besides.
        self._reading = self._wanted = 0

    @property
    def piece_bytes(self) -> int:
        """See `PooledReader`."""
        return self._pace.piece_bytes

    def segment(self, file: Path | RemoteFile, offset: int, nbytes: int) -> Segment:
        """See `Reader.segment`."""
        return Segment(file, offset, nbytes, 0, nbytes)

    def _read_piece(self, piece: Segment, target: memoryview) -> None:
        assert isinstance(piece.file, RemoteFile)
        with self._turn:
            self._wanted += 1
            self._turn.wait_for(lambda: self._reading < self._pace.connections)
            self._reading += 1
        try:
            start = time.monotonic()
            waited = self._ranges.read_into(piece.file, piece.offset, target[: piece.needed])
            now = time.monotonic()
        finally:
            with self._turn:
                self._reading -= 1
                self._wanted -= 1
                crowded = self._wanted > self._reading
                self._turn.notify_all()
        if crowded:
            self._pace.note(piece.needed, waited, now - start, now)
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
