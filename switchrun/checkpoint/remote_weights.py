"""Reads headers of weights files on the Hub, in few requests: each fetches more than what is asked for, and is kept.

If it is known how many entries a file has, two suffice.
"""

from __future__ import annotations

from switchrun.checkpoint.files import check_weights, truncated
from switchrun.checkpoint.remote import HubRanges
from switchrun.checkpoint.types import RemoteFile

#: From a place that is asked for. switch-c-2048's pickles have 40 KB at the front of each file.
_FRONT_BYTES = 96 * 1024
#: From the end, if anything there is asked for. Their zip directories have 40 KB.
_END_BYTES = 48 * 1024
#: What an entry takes in a pickle, and in a directory; QMoE's files for switch-c-2048 have 155 and 62 to 75.
_ENTRY_FRONT_BYTES, _ENTRY_END_BYTES = 160, 80


class RemoteWeights:
    """`Weights` on the Hub, which raise what `HubRanges.read` does; see `open_remote`."""

    remedy = "it is damaged on the Hub; take another model or revision"

    def __init__(self, file: RemoteFile, ranges: HubRanges, entries: int = 0) -> None:
        self.place = file
        self.size = file.size
        self._ranges = ranges
        self._front = _FRONT_BYTES + entries * _ENTRY_FRONT_BYTES
        self._end = _END_BYTES + entries * _ENTRY_END_BYTES
        #: What was fetched, by its first byte.
        self._kept: dict[int, bytes] = {}

    def read(self, offset: int, length: int) -> bytes:
        """As `Weights` says."""
        end = offset + length
        if end > self.size:
            raise truncated(self, f"it has {self.size} bytes, not {end} or more")
        for start, data in self._kept.items():
            if start <= offset and end <= start + len(data):
                return data[offset - start : end - start]
            if start <= offset < start + len(data):
                # A header that is longer than what was fetched: the rest alone.
                return data[offset - start :] + self._ranges.read(
                    self.place, start + len(data), end - start - len(data)
                )
        start = max(0, min(offset, self.size - self._end))
        data = self._ranges.read(self.place, start, min(max(length, self._front), self.size - start))
        self._kept[start] = data
        return data[offset - start : end - start]


def open_remote(file: RemoteFile, ranges: HubRanges, entries: int = 0) -> RemoteWeights:
    """Open a weights file of the Hub to read headers; CorruptCheckpointError if it is empty, or a Git LFS pointer.

    `entries` is about how many tensors it has, if that is known.
    """
    weights = RemoteWeights(file, ranges, entries)
    check_weights(weights, "the repository holds no weights there; take another one")
    return weights
