"""Runs cells one after another, each fill in a process of its own where it shall be cold, and makes their records."""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from switchrun import __version__
from switchrun.bench.child_process import CHILD, Answer, ChildError, OnStep, run_child
from switchrun.bench.raw_disk import drop_page_cache
from switchrun.bench.records import SCHEMA_VERSION, SPARSE, Record, cell_record
from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.errors import SwitchrunError
from switchrun.machine import disks, ram
from switchrun.machine.files import system_lines
from switchrun.planning.opening import find_kept
from switchrun.planning.options import OpenOptions
from switchrun.store import model_name
from switchrun.store.paths import dense_path

_PACKAGES = ("torch", "transformers", "accelerate")


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination of settings: what is measured, and how.

    Attributes:
        model: A folder or a Hub id; None for the demo model.
        cpu_memory_bytes: What the process may take; None for most of what is available.
        hub: How a model of the Hub is opened.
        output_tokens: Tokens generated for each sequence, no fewer and no more.
        warmup: Fills before the measured ones that are thrown away.
        cache: `cold`: each fill in a process of its own, and the checkpoint not in the page cache. `warm`: all fills
            in one process, which keeps its experts.
    """

    model: str | None
    dtype: str = "auto"
    cpu_memory_bytes: int | None = None
    gpu_memory: str | None = None
    hub: str = "auto"
    batch_size: int = 1
    input_tokens: int = 24
    output_tokens: int = 12
    repeats: int = 3
    warmup: int = 0
    cache: Literal["cold", "warm"] = "cold"
    seed: int = 0

    def __str__(self) -> str:
        memory = "" if self.cpu_memory_bytes is None else f", {self.cpu_memory_bytes / 2**30:.3g} GiB"
        return f"{self.dtype}{memory}, batch {self.batch_size}, {self.cache}"


def product(
    first: Cell, dtypes: Sequence[str], cpu_memories: Sequence[int | None], batch_sizes: Sequence[int]
) -> list[Cell]:
    """Return a cell for each combination; the last list varies fastest."""
    return [
        replace(first, dtype=dtype, cpu_memory_bytes=memory, batch_size=batch)
        for dtype, memory, batch in itertools.product(dtypes, cpu_memories, batch_sizes)
    ]


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cells share; `synthetic` describes weights that are made up, `tell` takes a line for a human.

    `watch` takes what is measured now, and returns what takes the steps of the process that measures it.
    """

    checkpoint: SwitchCheckpoint
    offload_folder: Path
    synthetic: dict[str, Any] | None
    tell: Callable[[str], None]
    watch: Callable[[str], OnStep] = lambda _what: lambda _step: None

    def run(self, cells: Sequence[Cell], finished: Sequence[Record] = ()) -> Iterator[Record]:
        """Yield the record of each cell as soon as there is one; a cell that fails has its error there.

        Cells that have a record in `finished` are not run again.
        """
        notes = self._notes()
        for note in notes:
            self.tell(f"{'warning' if SPARSE in note else 'note'}: {note}")
        for number, cell in enumerate(cells, 1):
            label, knobs = f"cell {number} of {len(cells)}", asdict(cell)
            known = next((each for each in finished if each["status"] == "ok" and each["knobs"] == knobs), None)
            if known is not None:
                self.tell(f"{label}: already there")
                yield known
                continue
            environment = describe_environment(self.checkpoint.path)
            head = {"knobs": knobs, "environment": environment, "synthetic": self.synthetic}
            try:
                yield cell_record(head, self._measure(cell, label), notes)
            except ChildError as error:
                yield {"schema_version": SCHEMA_VERSION, "status": "failed", **head, "error": error.record}

    def _notes(self) -> list[str]:
        """Return what to keep in mind of every cell: that weights are made up, or not there."""
        if self.synthetic:
            return [self.synthetic["note"]]
        files = weight_files(self.checkpoint)
        sparse = sum(map(disks.is_sparse, files))
        what = (
            f"{sparse} of {len(files)} files in {self.checkpoint.path} are {SPARSE}, whose holes take no time to read"
        )
        return [f"{what}: measure with a complete checkpoint"] if sparse else []

    def _measure(self, cell: Cell, label: str) -> list[Answer]:
        """Run a cell's processes, and return the answers without the fills that only warm up."""
        cold, fills = cell.cache == "cold", cell.warmup + cell.repeats
        answers = []
        for turn in range(fills if cold else 1):
            on_step = self.watch(f"{label}: {cell}, {f'fill {turn + 1} of {fills}' if cold else f'{fills} fills'}")
            dropped = drop_page_cache(model_files(self.checkpoint, self.offload_folder, cell.dtype)) if cold else None
            task = {"work": "measure", "fills": 1 if cold else fills, "offload_folder": str(self.offload_folder)}
            answer = run_child(CHILD, asdict(cell) | task, on_step=on_step) | {"page_cache_dropped": dropped}
            for warning in answer["warnings"]:
                self.tell(f"warning: {label}: {warning}")
            answers.append(answer)
        if cold:
            return answers[cell.warmup :]
        return [answer | {"fills": answer["fills"][cell.warmup :]} for answer in answers]


def weight_files(checkpoint: SwitchCheckpoint) -> set[Path]:
    """Return the local files that a checkpoint's weights are in."""
    slices = [tensor for expert in checkpoint.experts.values() for tensor in expert]
    files = {tensor.file for tensor in [*slices, *checkpoint.dense.values()]}
    return {file for file in files if isinstance(file, Path)}


def model_files(checkpoint: SwitchCheckpoint, offload_folder: Path, dtype: str) -> set[Path]:
    """Return the files that a fill may read: the checkpoint's, and what is kept of it for a dtype."""
    kept: set[Path] = set()
    with contextlib.suppress(SwitchrunError):  # the cell will say it
        options = OpenOptions(offload_folder=offload_folder, dtype=dtype)
        kept = {path for path, _ in find_kept(checkpoint, options).files.values()}
        dense = dense_path(offload_folder, model_name(checkpoint))
        kept |= {dense} if dense.is_file() else set()
    return kept | weight_files(checkpoint)


def describe_environment(checkpoint: Path) -> dict[str, Any]:
    """Return what a measurement was made on, as JSON has it; the disk is that of the checkpoint's folder."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "switchrun": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": ram.total_memory_bytes(),
        "available_memory_bytes": ram.available_memory_bytes(),
        "disk": _disk(checkpoint),
        "kernel": platform.release(),
    }


def _cpu_model() -> str | None:
    for line in system_lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    # `platform.processor` would run a program called uname, whichever the path finds first.
    return platform.machine() or None


def _disk(path: Path) -> dict[str, str | None]:
    device = disks.device_of(path)
    block = (Path("/sys/dev/block") / device).resolve()
    # That of a partition is its disk's, one folder up.
    models = (line.strip() for place in (block, block.parent) for line in system_lines(place / "device" / "model"))
    model = next(filter(None, models), None)
    return {
        "number": device,
        "name": block.name if block.exists() else None,
        "model": model,
        "filesystem": disks.filesystem_of(path),
    }
