"""Dense weights on their way into memory while torch and transformers are still being imported. No torch.

Importing them takes seconds of the processor in which the disk would have nothing to do.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from switchrun.checkpoint.types import SwitchCheckpoint, TensorSlice
from switchrun.experts.buffers import Buffers
from switchrun.experts.reader import FileReader
from switchrun.experts.ways import known_way
from switchrun.planning import Plan, memory
from switchrun.planning.device_map import tier_of
from switchrun.store.layout import ALIGNMENT


class Landing:
    """A tensor on its way into whole pages of its own, which may be touched first; reading begins at once."""

    def __init__(self, reader: FileReader, tensor: TensorSlice, touch: bool = False) -> None:
        # With its header, and a little more, so that it lies where products can use it.
        before = min(-(-tensor.header_bytes // ALIGNMENT) * ALIGNMENT, tensor.offset)
        read = reader.segment(tensor.file, tensor.offset - before, before + tensor.nbytes)
        self.position = tensor.offset - read.offset
        # Read once: huge pages would cost more than they save.
        self.buffer = Buffers(1, -(-read.length // mmap.PAGESIZE) * mmap.PAGESIZE, huge=False)[0]
        self._end = reader.begin([read], self.buffer.data, new=touch)

    def wait(self) -> None:
        """Block until the tensor is there."""
        self._end.result()


class DensePreload:
    """Reads the dense weights that belong into CPU memory ahead of everything else.

    Weights that are kept as they are stored stay where they are read to. The others, which are converted or packed when
    torch is there, are read ahead as far as they fit into the room of the expert slots, which are filled later: they go
    when they are taken.

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
        # That of the disk where they lie: of a model of the Hub, it is the offload folder's.
        way = known_way(Path(str(next(iter(checkpoint.dense.values())).file)))
        # What stays on disk is read again and again, so the page cache may help there: then nothing is read past it.
        self._reader = FileReader(memory.reads_dense_directly(checkpoint, plan.device_map), way)
        self.landings = {name: Landing(self._reader, each, touch=True) for name, each in (kept | staged).items()}
        self._staged = set(staged)

    @property
    def nbytes(self) -> int:
        """Memory that is resident once every weight is there."""
        return sum(landing.buffer.size for landing in self.landings.values())

    def take(self, name: str) -> Landing | None:
        """Return where a weight lands, if it is read ahead and was not taken already."""
        return self.landings.pop(name, None) if name in self._staged else self.landings.get(name)

    def close(self) -> None:
        """Wait for reads under way, drop the others, which never land, and close the files; may be called again."""
        self._reader.close(drop=True)

    def __enter__(self) -> DensePreload:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
