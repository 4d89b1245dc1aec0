"""Which way to read a disk is best: tried on the experts themselves when a disk is first met, then remembered."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from switchrun.checkpoint.types import ExpertKey, ExpertSlices
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.buffers import Buffers
from switchrun.experts.reader import FileReader, Segment, Way
from switchrun.machine import disks
from switchrun.machine.files import open_regular
from switchrun.units import MIB

#: One of them was the best on every disk that was tried; the first is taken until another has shown that it is better.
WAYS = (Way(), Way(1, 32 * MIB), Way(2, 16 * MIB), Way(8, 2 * MIB), Way(4, 4 * MIB, direct=False))
#: Trying ends after this time, whatever the disk.
PROBE_SECONDS = 0.25
#: So much of a matrix is read at a time: enough for several threads, little enough for a slow disk.
_SAMPLE_BYTES = 32 * MIB
#: Enough for the fastest disk.
_MOST_EXPERTS = 256
#: Another way must be better by this factor: less is noise, on a shared disk more than on others.
_MARGIN = 1.15
#: With fewer samples of each nothing is known.
_FEWEST_SAMPLES = 2


def reading_way(experts: Mapping[ExpertKey, ExpertSlices], kept: Path | None = None) -> Way:
    """Return the best way to read the disk that experts lie on; blocks for at most a read longer than `PROBE_SECONDS`.

    That of experts from the Hub is the disk of the folder `kept`, which is never tried: there may be nothing there yet.
    The answer is kept in the user's cache folder for each filesystem. Sparse files are not tried: holes are no disk.
    """
    file = next(iter(experts.values())).wi.file
    if not isinstance(file, Path):
        return (known_way(kept) if kept else None) or WAYS[0]
    known = known_way(file)
    if known or disks.is_sparse(file):
        return known or WAYS[0]
    chosen = best_way(_probe(experts))
    disks.remember("reading", file, asdict(chosen))
    return chosen


def known_way(file: Path) -> Way | None:
    """Return the way that was best on the disk where a file or folder lies, if that was tried."""
    known = disks.recall("reading", file)
    return next((way for way in WAYS if known == asdict(way)), None)


def best_way(samples: Mapping[Way, list[float]]) -> Way:
    """Choose by the median of the rates that each way has reached: the first, unless another is clearly better."""
    if any(len(rates) < _FEWEST_SAMPLES for rates in samples.values()):
        return WAYS[0]
    medians = {way: statistics.median(rates) for way, rates in samples.items()}
    best = max(WAYS, key=medians.__getitem__)
    return best if medians[best] > _MARGIN * medians[WAYS[0]] else WAYS[0]


def _probe(experts: Mapping[ExpertKey, ExpertSlices]) -> dict[Way, list[float]]:
    """Read matrices here and there, each way in turn and none of them what another has read."""
    keys = random.sample(list(experts), min(len(experts), _MOST_EXPERTS))
    slices = iter([tensor for key in keys for tensor in experts[key]])
    samples: dict[Way, list[float]] = {way: [] for way in WAYS}
    buffer = Buffers(1, _SAMPLE_BYTES + MIB)[0].data
    buffer[:] = bytes(len(buffer))  # new pages are slower than many disks
    end = time.perf_counter() + PROBE_SECONDS
    with ExitStack() as stack:
        readers = {}
        for way in WAYS:
            readers[way] = FileReader(True, way)
            stack.callback(readers[way].close)
        try:
            for tensor in slices:
                way = min(WAYS, key=lambda way: len(samples[way]))
                read = readers[way].segment(tensor.file, tensor.offset, min(tensor.nbytes, _SAMPLE_BYTES))
                _forget(read)
                start = time.perf_counter()
                readers[way].read([read], buffer)
                samples[way].append(read.length / (time.perf_counter() - start))
                if time.perf_counter() > end:
                    break
        except (OSError, CorruptCheckpointError):
            pass  # whoever needs what cannot be read will say so
    return samples


def _forget(read: Segment) -> None:
    """Put what will be read out of the page cache, where a way through it would find it."""
    assert isinstance(read.file, Path)
    file = open_regular(read.file)
    try:
        os.posix_fadvise(file, read.offset, read.length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
