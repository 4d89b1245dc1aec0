"""What `switchrun prepare` will do: which experts, how many bytes, how many jobs; from headers and file names alone."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from switchrun.checkpoint.types import ExpertKey, Stack, SwitchCheckpoint
from switchrun.errors import BudgetError, StorageError, UsageError
from switchrun.planning.estimate import Bandwidth
from switchrun.planning.memory import buffer_for, index_bytes
from switchrun.store import ExpertStore, Layout
from switchrun.store.paths import expert_path, stored_experts
from switchrun.units import MIB, format_bytes

#: Interpreter and torch, resident once an expert has been quantised. Measured with torch 2.13 (CPU), Python 3.11.
RUNTIME_BYTES = 260 * MIB
#: What quantising takes besides the expert before and after it: float32 blocks, tables, a thread's stack and arena.
SCRATCH_BYTES = 16 * MIB

_PAGE = 4096
_LAYERS = re.compile(r"(encoder|decoder)(?:\.([0-9]+)(?:-([0-9]+))?)?", re.ASCII)
_NUMBERS = re.compile(r"([0-9]+)(?:-([0-9]+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is to be done.

    Attributes:
        todo: The experts to quantise, in the model's order.
        stored: Those that were chosen and are stored already.
        damaged: How many of `todo` had a file that is damaged.
        left_out: How many experts the limit leaves out.
        file_bytes: What one takes on disk.
        read_bytes: What is read from the checkpoint for one.
        free_bytes: What the filesystem has free.
    """

    todo: tuple[ExpertKey, ...]
    stored: tuple[ExpertKey, ...]
    damaged: int
    left_out: int
    file_bytes: int
    read_bytes: int
    free_bytes: int

    @property
    def write_bytes(self) -> int:
        """What will be written."""
        return len(self.todo) * self.file_bytes

    def estimate(self, disk: Bandwidth, packing_seconds: float) -> TimeEstimate:
        """Estimate how long it takes.

        Args:
            disk: How fast the disk reads; it is taken to write as fast.
            packing_seconds: What quantising takes for one expert, with all jobs at work.
        """
        count = len(self.todo)
        return TimeEstimate(
            reading=count * self.read_bytes / disk.bytes_per_second,
            packing=count * packing_seconds,
            writing=self.write_bytes / disk.bytes_per_second,
        )


@dataclass(frozen=True, slots=True)
class TimeEstimate:
    """Seconds that reading, quantising and writing all experts take, each by itself."""

    reading: float
    packing: float
    writing: float

    @property
    def least(self) -> float:
        """All of it, if the jobs keep disk and processor at work at the same time."""
        return max(self.reading + self.writing, self.packing)

    @property
    def most(self) -> float:
        """All of it, if one waits for the other; so it is with a single job."""
        return self.reading + self.writing + self.packing


@dataclass(frozen=True, slots=True)
class PreparedCounts:
    """What was done.

    Attributes:
        written: Experts that were quantised and stored.
        skipped: Experts that were stored already.
        rebuilt: How many of those written had been stored, and were damaged.
    """

    written: int
    skipped: int
    rebuilt: int


def choose_experts(checkpoint: SwitchCheckpoint, layers: str | None, experts: str | None) -> list[ExpertKey]:
    """Give the experts that `--layers` and `--experts` name, in the model's order.

    Args:
        checkpoint: The checkpoint.
        layers: Such as `encoder`, `encoder.1` or `encoder.1,decoder.3-7`; None is all. Blocks of a range that have no
            experts are passed over.
        experts: Numbers within each layer, such as `0-15,20`; None is all.

    Raises:
        UsageError: It is not such a list, or names what the model does not have.
    """
    blocks = {(stack, block) for stack, blocks in checkpoint.sparse_blocks.items() for block in blocks}
    if layers is not None:
        blocks = {block for part in layers.split(",") for block in _layers(part.strip(), checkpoint)}
    numbers = range(checkpoint.num_experts)
    wanted = set(numbers)
    if experts is not None:
        wanted = {number for part in experts.split(",") for number in _numbers(part.strip(), numbers)}
    return [key for key in checkpoint.experts if (key.stack, key.block) in blocks and key.expert in wanted]


def _layers(part: str, checkpoint: SwitchCheckpoint) -> list[tuple[Stack, int]]:
    match = _LAYERS.fullmatch(part)
    if match is None:
        raise UsageError(f"--layers: '{part}' names no layers", "write it like encoder.1,decoder.3-7")
    stack = cast(Stack, match[1])
    there = checkpoint.sparse_blocks[stack]
    first = int(match[2]) if match[2] else 0
    last = int(match[3]) if match[3] else first if match[2] else max(there, default=0)
    found = [(stack, block) for block in there if first <= block <= last]
    if not found:
        listed = ", ".join(map(str, there)) or "none"
        raise UsageError(f"--layers: '{part}' has no experts", f"blocks of the {stack} that have: {listed}")
    return found


def _numbers(part: str, there: range) -> range:
    match = _NUMBERS.fullmatch(part)
    first = int(match[1]) if match else 0
    last = int(match[2] or match[1]) if match else -1
    if not first <= last < there.stop:
        raise UsageError(f"--experts: '{part}' names no experts of this model", f"they are 0 to {there.stop - 1}")
    return range(first, last + 1)


def job_bytes(checkpoint: SwitchCheckpoint, layout: Layout) -> int:
    """Give the memory of one job: an expert as stored, the same quantised, and what is needed in between."""
    return buffer_for(next(iter(checkpoint.experts.values()))) + packed_buffer_bytes(layout) + SCRATCH_BYTES


def packed_buffer_bytes(layout: Layout) -> int:
    """Give the bytes of a buffer for a quantised expert."""
    return -(-layout.nbytes // _PAGE) * _PAGE


def process_bytes(checkpoint: SwitchCheckpoint, layout: Layout, jobs: int) -> int:
    """Give the memory of the whole process at work."""
    return RUNTIME_BYTES + index_bytes(checkpoint) + jobs * job_bytes(checkpoint, layout)


def resolve_jobs(checkpoint: SwitchCheckpoint, layout: Layout, jobs: int | None, cpu_bytes: int) -> int:
    """Decide how many jobs run side by side: as many as are asked for, else one a core as far as they fit.

    Raises:
        BudgetError: They do not fit into the memory allowed.
    """
    wanted = jobs or len(os.sched_getaffinity(0))
    spare = cpu_bytes - process_bytes(checkpoint, layout, 0)
    fitting = spare // job_bytes(checkpoint, layout)
    if fitting >= wanted:
        return wanted
    if jobs is None and fitting >= 1:
        return fitting
    needed = -(-process_bytes(checkpoint, layout, jobs or 1) // MIB)
    raise BudgetError(
        f"{jobs or 1} at a time, preparing needs at least {needed} MiB of CPU memory; "
        f"{format_bytes(cpu_bytes)} is allowed",
        f"give --cpu-memory {needed}MiB" + (f" or --jobs {fitting}" if fitting >= 1 else ""),
    )


def make_preparation(
    checkpoint: SwitchCheckpoint, store: ExpertStore, keys: Iterable[ExpertKey], limit_bytes: int | None
) -> Preparation:
    """Look which experts are stored, and which fit under the limit; writes nothing.

    Args:
        checkpoint: The checkpoint.
        store: Its store. Where that may be written, damaged files are deleted.
        keys: The experts that were chosen.
        limit_bytes: What all of the store's experts may take. None is deleted for it: those that are left out are the
            last ones.
    """
    todo: list[ExpertKey] = []
    stored: list[ExpertKey] = []
    damaged = 0
    for key in keys:
        there = expert_path(store.folder, key).exists()
        if store.find(key) is not None:
            stored.append(key)
        else:
            todo.append(key)
            damaged += there
    left_out = 0
    if limit_bytes is not None:
        taken = sum(status.st_size for _, status in stored_experts(store.folder))
        fitting = max(0, limit_bytes - taken) // store.file_bytes
        left_out = max(0, len(todo) - fitting)
        del todo[fitting:]
    return Preparation(
        tuple(todo),
        tuple(stored),
        damaged,
        left_out,
        store.file_bytes,
        checkpoint.expert_bytes,
        shutil.disk_usage(_existing(store.folder)).free,
    )


def check_room(preparation: Preparation, folder: Path) -> None:
    """Refuse to begin what cannot be finished.

    Raises:
        StorageError: The disk has too little room.
    """
    if preparation.write_bytes > preparation.free_bytes:
        raise StorageError(
            f"{folder} has {format_bytes(preparation.free_bytes)} free, "
            f"the experts take {format_bytes(preparation.write_bytes)}",
            "make room, choose fewer with --limit or --layers, or name another --offload-folder",
        )


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
