"""Dense weights on their way into memory while torch and transformers are still being imported. No torch.

Importing them takes seconds of the processor in which the disk would have nothing to do.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial

from switchrun._plan import Prepared
from switchrun.checkpoint.types import TensorSlice
from switchrun.experts.reader import WAYS, FileReader, known_way
from switchrun.planning import memory
from switchrun.planning.device_map import tier_of


class DensePreload:
    """Begins to read the dense weights that will stay in CPU memory as they are stored; all into one mapping.

    What must be converted or packed is left out (it would be in memory twice), and so are routers, which compute in
    float32.

    Args:
        prepared: The checkpoint and its plan.

    Attributes:
        nbytes: Size of the mapping; all of it is resident once `wait` has been called for each of `names`.
        mapping: Holds the tensors; it lives as long as a view of it.

    Owns its threads and files until `close`, which waits for reads under way.
    """

    def __init__(self, prepared: Prepared) -> None:
        checkpoint, plan = prepared.checkpoint, prepared.plan
        wanted = {
            name: tensor
            for name, tensor in checkpoint.dense.items()
            if memory.is_kept_as_stored(name, tensor, plan.precision) and tier_of(name, plan.device_map) == "cpu"
        }
        way = known_way(next(iter(checkpoint.experts.values())).wi.file) or WAYS[0]
        # What stays on disk is read again and again, so the page cache may help there: then nothing is read past it.
        self._reader = FileReader(memory.reads_dense_directly(checkpoint, plan.device_map), way)
        self._ends: dict[str, Future[None]] = {}
        self._positions: dict[str, int] = {}
        self._start(wanted)

    def _start(self, wanted: Mapping[str, TensorSlice]) -> None:
        cursor, reads = 0, []
        for name, tensor in sorted(wanted.items(), key=lambda item: (str(item[1].file), item[1].offset)):
            read = self._reader.segment(tensor.file, tensor.offset, tensor.nbytes)
            reads.append((name, read, cursor))
            self._positions[name] = cursor + tensor.offset - read.offset
            cursor += -(-read.length // mmap.PAGESIZE) * mmap.PAGESIZE
        self.nbytes = cursor
        self.mapping = mmap.mmap(-1, max(cursor, mmap.PAGESIZE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):
            self.mapping.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(self.mapping)
        for name, read, start in reads:
            end: Future[None] = Future()
            self._ends[name] = end
            self._reader.submit([read], view[start : start + read.length], partial(_settle, end))

    @property
    def names(self) -> tuple[str, ...]:
        """What is read, in this order."""
        return tuple(self._ends)

    def wait(self, name: str) -> int | None:
        """Give the byte of the mapping at which a tensor begins; blocks until it is there. None if it is not read.

        Raises:
            CorruptCheckpointError: It cannot be read.
        """
        if name not in self._ends:
            return None
        self._ends[name].result()
        return self._positions[name]

    def close(self) -> None:
        """Wait for reads under way, end the threads and close the files."""
        self._reader.close()


def _settle(end: Future[None], error: BaseException | None) -> None:
    if error is None:
        end.set_result(None)
    else:
        end.set_exception(error)
