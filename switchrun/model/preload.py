"""Dense weights on their way into memory while torch and transformers are still being imported. No torch.

Importing them takes seconds of the processor in which the disk would have nothing to do.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from importlib import import_module

from switchrun.checkpoint.types import SwitchCheckpoint, TensorSlice
from switchrun.experts.buffers import Buffers
from switchrun.experts.reader import WAYS, FileReader, known_way, settle
from switchrun.planning import Plan, memory
from switchrun.planning.device_map import tier_of
from switchrun.planning.opening import PlannedModel

#: Imports torch, transformers and what else a plan needs.
ImportLibraries = Callable[[Plan], None]


class _Landing:
    """Memory into which some tensors are read, each to whole pages of its own; reading begins at once."""

    def __init__(self, reader: FileReader, tensors: Mapping[str, TensorSlice]) -> None:
        self._positions: dict[str, int] = {}
        self._ends: dict[str, Future[None]] = {name: Future() for name in tensors}
        reads = []
        self.nbytes = 0
        for name, tensor in tensors.items():
            read = reader.segment(tensor.file, tensor.offset, tensor.nbytes)
            reads.append((read, self.nbytes, self._ends[name]))
            self._positions[name] = self.nbytes + tensor.offset - read.offset
            self.nbytes += -(-read.length // mmap.PAGESIZE) * mmap.PAGESIZE
        # Read once, while importing keeps the processor busy: huge pages would cost more than they save.
        buffer = Buffers(1, self.nbytes, huge=False)
        self._memory = buffer.memory
        for read, start, end in reads:
            target = buffer.view(0)[start : start + read.length]
            reader.submit([read], target, partial(settle, end), new=True)

    def find(self, name: str) -> tuple[mmap.mmap, int]:
        self._ends[name].result()
        return self._memory, self._positions[name]


class DensePreload:
    """Reads the dense weights that belong into CPU memory ahead of everything else.

    Weights that are kept as they are stored stay where they are read to. The others, which are converted or packed when
    torch is there, are read ahead as far as they fit into the room of the expert slots, which are made later; they are
    dropped with `drop_staged` before that.

    Args:
        checkpoint: The checkpoint.
        plan: Which weights belong there, and how large the slots will be.

    Attributes:
        kept: Names of the weights that stay; the memory lives as long as a view of it.
        staged: Names of those that do not.

    Owns its threads and files until `close`, which waits for reads under way. A context manager.
    """

    def __init__(self, checkpoint: SwitchCheckpoint, plan: Plan) -> None:
        kept: dict[str, TensorSlice] = {}
        staged: dict[str, TensorSlice] = {}
        room = plan.tier("cpu").expert_bytes
        for name, tensor in sorted(checkpoint.dense.items(), key=lambda item: (str(item[1].file), item[1].offset)):
            if tier_of(name, plan.device_map) != "cpu":
                continue
            if memory.is_kept_as_stored(name, tensor, plan.precision):
                kept[name] = tensor
            elif memory.read_buffer_bytes(tensor.nbytes) <= room:
                room -= memory.read_buffer_bytes(tensor.nbytes)
                staged[name] = tensor
        way = known_way(next(iter(checkpoint.experts.values())).wi.file) or WAYS[0]
        # What stays on disk is read again and again, so the page cache may help there: then nothing is read past it.
        self._reader = FileReader(memory.reads_dense_directly(checkpoint, plan.device_map), way)
        self.kept, self.staged = tuple(kept), tuple(staged)
        self._landings: dict[str, _Landing] = {}
        for tensors in (kept, staged):
            self._landings |= dict.fromkeys(tensors, _Landing(self._reader, tensors))

    @property
    def nbytes(self) -> int:
        """Memory that is resident once `find` has returned every weight."""
        return sum(landing.nbytes for landing in set(self._landings.values()))

    def find(self, name: str) -> tuple[mmap.mmap, int] | None:
        """Return the memory, and the byte of it at which a weight begins, once it is there; None if it is not read.

        Raises:
            CorruptCheckpointError: It cannot be read.
        """
        landing = self._landings.get(name)
        return None if landing is None else landing.find(name)

    def drop_staged(self) -> None:
        """Let go of the weights that do not stay: their memory goes with the last view of it."""
        for name in self.staged:
            del self._landings[name]
        self.staged = ()

    def close(self) -> None:
        """Wait for reads under way, drop the others, end the threads and close the files; may be called again.

        What was dropped is never there: only what was found before can still be found.
        """
        self._reader.close(drop=True)

    def __enter__(self) -> DensePreload:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def read_while_importing(planned: PlannedModel, import_libraries: ImportLibraries) -> Iterator[DensePreload]:
    """Begin to read dense weights, and import the libraries meanwhile; reads that still wait at the end are dropped."""
    with DensePreload(planned.checkpoint, planned.plan) as preload:
        import_libraries(planned.plan)
        yield preload


def import_model(plan: Plan) -> None:
    """Import the model's code and the libraries that a plan needs; blocks for seconds."""
    import_module("switchrun.model.engine")
    if _uses_bitsandbytes(plan):
        # Else the first product would wait for it.
        import_module("switchrun.kernels.bitsandbytes_ops").operations()


def _uses_bitsandbytes(plan: Plan) -> bool:
    """A GPU does for int8 and nf4, a CPU for nf4 if it is fast there."""
    from switchrun.kernels.matrices import TORCH_DTYPES
    from switchrun.kernels.nf4 import bitsandbytes_unpacks

    packed, compute = plan.precision.packed, plan.precision.compute
    if packed is None:
        return False
    return bool(plan.gpus) or (packed == "nf4" and bitsandbytes_unpacks(TORCH_DTYPES[compute.stored]))
