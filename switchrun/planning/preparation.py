"""What `switchrun prepare` will do: which experts, how many bytes, how many jobs; from headers and file names alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from switchrun.checkpoint.types import ExpertKey, Stack, SwitchCheckpoint
from switchrun.errors import BudgetError, StorageError, UsageError
from switchrun.machine import disks
from switchrun.planning.memory import buffer_for, index_bytes
from switchrun.planning.plan import Bandwidth, SparseLayer
from switchrun.store import ExpertStore, Layout
from switchrun.store.paths import stored_experts
from switchrun.units import MIB, format_bytes, mib_up

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
        todo: The experts to quantise, in the model's order; `damaged` is how many of them had a file that is damaged.
        stored: Those that were chosen and are stored already; `left_out` is how many the limit leaves out.
        file_bytes: What one takes on disk; `read_bytes` is what is read from the checkpoint for one.
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

    def estimate(self, disk: Bandwidth, packing_seconds: float, network: Bandwidth | None = None) -> TimeEstimate:
        """Estimate how long it takes, if the disk writes as fast as it reads.

        `packing_seconds` is what quantising takes for one expert, with all jobs at work; `network` is how fast the Hub
        is, if experts come from there.
        """
        reading = len(self.todo) * self.read_bytes / (network or disk).bytes_per_second
        packing = len(self.todo) * packing_seconds
        writing = self.write_bytes / disk.bytes_per_second
        return TimeEstimate(reading, packing, writing, max(reading + writing, packing), reading + writing + packing)


class TimeEstimate(NamedTuple):
    """Seconds that reading, quantising and writing all experts take, each by itself, and all of it together.

    That is `least` if the jobs keep disk and processor at work at the same time, and `most` with a single job.
    """

    reading: float
    packing: float
    writing: float
    least: float
    most: float


class PreparedCounts(NamedTuple):
    """How many experts were written, skipped since they were stored already, and written in place of damaged ones."""

    written: int
    skipped: int
    rebuilt: int


def choose_experts(checkpoint: SwitchCheckpoint, layers: str | None, experts: str | None) -> list[ExpertKey]:
    """Return the experts that `--layers` and `--experts` name, in the model's order; None is all.

    Layers are written like `encoder`, `encoder.1` or `encoder.1,decoder.3-7`, experts like `0-15,20`: numbers within
    each layer. Blocks of a range that have no experts are passed over.

    Raises:
        UsageError: It is not such a list, or names what the model does not have.
    """
    blocks = {(stack, block) for stack, blocks in checkpoint.sparse_blocks.items() for block in blocks}
    if layers is not None:
        blocks = {layer for part in layers.split(",") for layer in _layers(part.strip(), checkpoint)}
    numbers = set(range(checkpoint.num_experts))
    if experts is not None:
        numbers = {number for part in experts.split(",") for number in _numbers(part.strip(), checkpoint.num_experts)}
    return [key for key in checkpoint.experts if (key.stack, key.block) in blocks and key.expert in numbers]


def _layers(part: str, checkpoint: SwitchCheckpoint) -> list[SparseLayer]:
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


def _numbers(part: str, num_experts: int) -> range:
    match = _NUMBERS.fullmatch(part)
    first = int(match[1]) if match else 0
    last = int(match[2] or match[1]) if match else -1
    if not first <= last < num_experts:
        raise UsageError(f"--experts: '{part}' names no experts of this model", f"they are 0 to {num_experts - 1}")
    return range(first, last + 1)


def packed_buffer_bytes(layout: Layout) -> int:
    """Return the size of a buffer for a quantised expert."""
    return -(-layout.nbytes // _PAGE) * _PAGE


def job_bytes(checkpoint: SwitchCheckpoint, layout: Layout) -> int:
    """Return the memory of one job: an expert as stored, the same quantised, and what is needed in between."""
    return buffer_for(next(iter(checkpoint.experts.values()))) + packed_buffer_bytes(layout) + SCRATCH_BYTES


def process_bytes(checkpoint: SwitchCheckpoint, layout: Layout, jobs: int) -> int:
    """Return the memory of the whole process at work."""
    return RUNTIME_BYTES + index_bytes(checkpoint) + jobs * job_bytes(checkpoint, layout)


def resolve_jobs(checkpoint: SwitchCheckpoint, layout: Layout, jobs: int | None, cpu_bytes: int) -> int:
    """Decide how many jobs run side by side: as many as are asked for, else one a core as far as they fit.

    Raises:
        BudgetError: They do not fit into the memory allowed.
    """
    wanted = jobs or len(os.sched_getaffinity(0))
    fitting = (cpu_bytes - process_bytes(checkpoint, layout, 0)) // job_bytes(checkpoint, layout)
    if fitting >= wanted:
        return wanted
    if jobs is None and fitting >= 1:
        return fitting
    needed = mib_up(process_bytes(checkpoint, layout, jobs or 1))
    raise BudgetError(
        f"{jobs or 1} at a time, preparing needs at least {needed} of CPU memory; {format_bytes(cpu_bytes)} is allowed",
        f"give --cpu-memory {needed.replace(' ', '')}" + (f" or --jobs {fitting}" if fitting >= 1 else ""),
    )


def make_preparation(
    checkpoint: SwitchCheckpoint, store: ExpertStore, keys: Iterable[ExpertKey], limit_bytes: int | None
) -> Preparation:
    """Find out which of the chosen experts are stored, and how many fit under the limit for all that the store keeps.

    The last ones are left out; nothing is deleted or written, but for damaged files where the store may be written.
    """
    todo: list[ExpertKey] = []
    stored: list[ExpertKey] = []
    damaged = left_out = 0
    for key in keys:
        there = store.has_file(key)
        if store.find(key) is not None:
            stored.append(key)
        else:
            todo.append(key)
            damaged += there
    if limit_bytes is not None:
        taken = sum(status.st_size for _, status in stored_experts(store.folder))
        fitting = max(0, limit_bytes - taken) // store.file_bytes
        left_out = max(0, len(todo) - fitting)
        del todo[fitting:]
    return Preparation(
        todo=tuple(todo),
        stored=tuple(stored),
        damaged=damaged,
        left_out=left_out,
        file_bytes=store.file_bytes,
        read_bytes=checkpoint.expert_bytes,
        free_bytes=disks.free_bytes(store.folder),
    )


def check_room(preparation: Preparation, folder: Path) -> None:
    """Raise a `StorageError` if the disk has too little room for all of it."""
    if preparation.write_bytes > preparation.free_bytes:
        raise StorageError(
            f"{folder} has {format_bytes(preparation.free_bytes)} free, "
            f"the experts take {format_bytes(preparation.write_bytes)}",
            "make room, choose fewer with --limit or --layers, or name another --offload-folder",
        )
