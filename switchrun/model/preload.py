"""Dense weights on their way into memory while torch and transformers are still being imported. No torch.

Importing them takes seconds of the processor in which the disk would have nothing to do.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial

from switchrun._plan import Prepared
from switchrun.checkpoint.types import TensorSlice
from switchrun.experts.fresh_slots import FreshSlots
from switchrun.experts.pages import Pages
from switchrun.experts.reader import WAYS, FileReader, known_way, settle
from switchrun.planning import memory
from switchrun.planning.device_map import tier_of


class Landing:
    """Memory into which some tensors are read, each to whole pages of its own.

    Args:
        reader: Reads them; begins at once.
        tensors: What to read, by name.
        pages: Where to, from the beginning on; without it, to new memory.

    Attributes:
        nbytes: Size of the memory used; all of it is resident once `find` has been called for each of `names`.
        names: What is read, in this order.
    """

    def __init__(self, reader: FileReader, tensors: Mapping[str, TensorSlice], pages: Pages | None = None) -> None:
        self._positions: dict[str, int] = {}
        self._ends: dict[str, Future[None]] = {name: Future() for name in tensors}
        self.names = tuple(tensors)
        cursor, reads = 0, []
        for name, tensor in tensors.items():
            read = reader.segment(tensor.file, tensor.offset, tensor.nbytes)
            reads.append((read, cursor, self._ends[name]))
            self._positions[name] = cursor + tensor.offset - read.offset
            cursor += -(-read.length // mmap.PAGESIZE) * mmap.PAGESIZE
        self.nbytes = cursor
        pages = pages or Pages(1, cursor, huge=False)  # read once, while importing keeps the processor busier still
        pages.claim(cursor)
        self._mapping = pages.memory
        view = memoryview(self._mapping)
        for read, start, end in reads:
            reader.submit([read], view[start : start + read.length], partial(settle, end), new=True)

    def find(self, name: str) -> tuple[mmap.mmap, int] | None:
        """Give the memory and the byte of it at which a tensor begins, once it is there; None if it is not read.

        Raises:
            CorruptCheckpointError: It cannot be read.
        """
        if name not in self._ends:
            return None
        self._ends[name].result()
        return self._mapping, self._positions[name]


class DensePreload:
    """Begins to read the dense weights that belong into CPU memory, and to take the memory of the expert slots.

    Weights that are kept as they are stored stay where they are read to. The others, which are converted or packed when
    torch is there, are read into the slots' memory, as far as there is room: nobody uses it before.

    Args:
        prepared: The checkpoint and its plan.

    Attributes:
        kept: Those that stay; the memory lives as long as a view of it.
        staged: Those that do not.

    Owns its threads and files until `close`, which waits for reads under way. A context manager, which closes it.
    """

    def __init__(self, prepared: Prepared) -> None:
        checkpoint, plan = prepared.checkpoint, prepared.plan
        use = plan.tier("cpu")
        kept: dict[str, TensorSlice] = {}
        staged: dict[str, TensorSlice] = {}
        room = use.expert_bytes
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
        self.kept = Landing(self._reader, kept)
        pages = Pages(use.expert_slots, use.slot_bytes)
        self.staged = Landing(self._reader, staged, pages)
        self._slots: FreshSlots | None = FreshSlots(pages, plan.estimate.expert_loads)

    @property
    def names(self) -> tuple[str, ...]:
        """All that is read, in this order."""
        return self.kept.names + self.staged.names

    @property
    def nbytes(self) -> int:
        """What is resident once `find` has been called for each of `names`."""
        return self.kept.nbytes + (self._slots.nbytes if self._slots else 0)

    def find(self, name: str) -> tuple[mmap.mmap, int] | None:
        """Give the memory and the byte of it at which a tensor begins, once it is there; None if it is not read.

        Raises:
            CorruptCheckpointError: It cannot be read.
        """
        return self.kept.find(name) or self.staged.find(name)

    def hand_over_slots(self, count: int) -> FreshSlots:
        """Let go of what does not stay, and give the first slots; the memory of the others is given back.

        To be called once, after `end_reads`; whoever gets them closes them.
        """
        assert self._slots is not None
        slots, self._slots = self._slots, None
        self.staged = Landing(self._reader, {}, slots.pages)
        slots.shrink(count)
        return slots

    def end_reads(self) -> None:
        """Wait for reads under way, drop the others, end the threads and close the files; may be called again.

        What was dropped is never there: only what was found before can still be found.
        """
        self._reader.close(drop=True)

    def close(self) -> None:
        """End the reads, and give back the slots that were not handed over; may be called again."""
        if self._slots is not None:
            self._slots.close()
        self.end_reads()

    def __enter__(self) -> DensePreload:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
