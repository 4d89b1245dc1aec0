"""Fetches the dense weights of a model of the Hub, once, into a file of the offload folder. No torch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from threading import Lock

from switchrun.checkpoint.hub import is_offline
from switchrun.checkpoint.range_check import check_checksum, check_header
from switchrun.checkpoint.remote import HubRanges
from switchrun.checkpoint.types import RemoteFile, TensorSlice
from switchrun.errors import NetworkError
from switchrun.planning.opening import PlannedModel
from switchrun.store.dense_file import DenseFile, DenseWriter
from switchrun.units import MIB, format_bytes

#: As experts are read at first; the file's disk is no limit.
_THREADS, _PIECE_BYTES = 8, 8 * MIB
#: How often one looks whether another process, which fetches the same weights, is done.
_LOOK_SECONDS = 0.2

#: Called with the bytes done and the bytes in all; both 0 while another process is waited for.
OnBytes = Callable[[int, int], None]


def with_dense_weights(planned: PlannedModel, on_bytes: OnBytes = lambda _done, _total: None) -> PlannedModel:
    """Return a planned model whose dense weights lie in files of this machine; blocks while they are fetched.

    What a stopped process has fetched is not fetched again. If another process fetches the same weights, it is waited
    for.

    Raises:
        NetworkError: The Hub could not be reached.
        CorruptCheckpointError: What it sent is not what it should be, or the folder belongs to something else.
        StorageError: The offload folder cannot be written.
    """
    checkpoint, hub = planned.checkpoint, planned.hub
    if checkpoint.hub is None or hub is None:
        return planned
    file = DenseFile(planned.options.folder, checkpoint)
    dense = file.slices()
    while dense is None:
        with file.writing() as writer:
            if writer is None:
                on_bytes(0, 0)
                time.sleep(_LOOK_SECONDS)
            else:
                _Fetch(writer, hub).run(on_bytes)
        dense = file.slices()
    return replace(planned, checkpoint=replace(checkpoint, dense=dense))


@dataclass(frozen=True, slots=True)
class _Piece:
    name: str
    tensor: TensorSlice
    position: int
    length: int


class _Fetch:
    """Fetches what a file lacks: a few pieces at a time, each tensor checked when its last piece is there."""

    def __init__(self, writer: DenseWriter, hub: HubRanges) -> None:
        self._writer = writer
        self._hub = hub
        missing = sorted(writer.missing.items(), key=lambda item: (str(item[1].file), item[1].offset))
        self._pieces = [
            _Piece(name, tensor, position, min(_PIECE_BYTES, tensor.nbytes - position))
            for name, tensor in missing
            for position in range(0, tensor.nbytes, _PIECE_BYTES)
        ]
        self._left = Counter(piece.name for piece in self._pieces)
        self._lock = Lock()

    def run(self, on_bytes: OnBytes) -> None:
        """Fetch all; blocks. Whatever is raised, reads under way are broken off, and what is complete stays."""
        total = self._writer.total_bytes
        done = total - sum(piece.length for piece in self._pieces)
        if self._pieces and is_offline():
            file, missing = self._pieces[0].tensor.file, format_bytes(total - done)
            raise NetworkError(
                f"{file}: {missing} of dense weights are not on this machine, and HF_HUB_OFFLINE is set",
                "unset it once",
            )
        self._writer.check_room(total - done)
        on_bytes(done, total)
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="switchrun-dense") as pool:
            try:
                futures = [pool.submit(self._fetch, piece) for piece in self._pieces]
                for future in as_completed(futures):
                    done += future.result()
                    on_bytes(done, total)
            except BaseException:
                self._hub.close()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self._writer.complete()

    def _fetch(self, piece: _Piece) -> int:
        tensor, before = piece.tensor, 0 if piece.position else piece.tensor.header_bytes
        assert isinstance(tensor.file, RemoteFile)
        data = memoryview(bytearray(before + piece.length))
        self._hub.read_into(tensor.file, tensor.offset + piece.position - before, data)
        if before:
            check_header(tensor, data, before)
        self._writer.write(piece.name, piece.position, data[before:])
        with self._lock:
            self._left[piece.name] -= 1
            last = not self._left[piece.name]
        if last:
            check_checksum(tensor, self._writer.chunks(piece.name))
            self._writer.finish(piece.name)
        return piece.length
