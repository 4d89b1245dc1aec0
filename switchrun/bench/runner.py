"""Runs cells one after another, each fill in its own process where it shall be cold, and makes their records."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from switchrun.bench.cells import Cell
from switchrun.bench.children import ChildError, run_child
from switchrun.bench.complete import complete_checkpoint
from switchrun.bench.environment import describe_environment
from switchrun.bench.page_cache import drop_page_cache
from switchrun.bench.records import Record, cell_record, failed_record
from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.dtypes import resolve_dtype
from switchrun.store import expert_path, model_name, store_folder, stored_experts

_CELL = "switchrun.bench.cell"
_BASELINE = "switchrun.bench.baseline"


@dataclass(frozen=True, slots=True)
class Bench:
    """What all cells share.

    Attributes:
        checkpoint: The model.
        offload_folder: Where switchrun, and the baseline, may write.
        synthetic: What the weights are if they are made up: see `switchrun.bench.synthetic_model`.
        baseline_timeout: Seconds that one process of the baseline may take.
        tell: Called with a line for a human whenever something begins.
    """

    checkpoint: SwitchCheckpoint
    offload_folder: Path
    synthetic: dict[str, Any] | None
    baseline_timeout: float
    tell: Callable[[str], None]

    def run(self, cells: Sequence[Cell], finished: Sequence[Record] = ()) -> Iterator[Record]:
        """Yield the record of each cell as soon as there is one; a cell that fails has its error there.

        Args:
            cells: What to measure.
            finished: Records of earlier runs; the cells that have one there are not run again.

        Raises:
            UsageError: The memory limit of a cell cannot be had here.
        """
        known = {_identity(record["knobs"]): record for record in finished if record["status"] == "ok"}
        for number, cell in enumerate(cells, 1):
            label = f"cell {number} of {len(cells)}"
            if _identity(cell.knobs()) in known:
                self.tell(f"{label}: already there")
                yield known[_identity(cell.knobs())]
                continue
            environment = describe_environment(self.checkpoint.path)
            head = {"knobs": cell.knobs(), "environment": environment, "synthetic": self.synthetic}
            try:
                yield cell_record(head, *self._run_cell(cell, label))
            except ChildError as error:
                yield failed_record(head, error.record)

    def _run_cell(self, cell: Cell, label: str) -> tuple[list[Any], list[Any], dict[str, Any] | None]:
        """Give the answers of all measured fills, the baseline's beside them, and what kept the baseline from it."""
        answers: list[Any] = []
        beside: list[Any] = []
        obstacle = self._obstacle(cell)
        turns = cell.warmup + cell.repeats if cell.cache == "cold" else 1
        fills = 1 if cell.cache == "cold" else cell.warmup + cell.repeats
        for turn in range(turns):
            self.tell(f"{label}: {_describe(cell)}, {'fill' if fills == 1 else 'process'} {turn + 1} of {turns}")
            task = cell.knobs() | {
                "offload_folder": str(self.offload_folder),
                "fills": fills,
                "cold": cell.cache == "cold",
                "turn": turn,
            }
            answers.append(self._child(_CELL, task, cell))
            for warning in answers[-1]["warnings"]:
                self.tell(f"warning: {label}: {warning}")
            if cell.baseline is None or obstacle is not None:
                continue
            self.tell(f"{label}: the same with {cell.baseline}")
            try:
                beside.append(self._run_baseline(task, answers[-1]["plan"], cell))
            except ChildError as error:
                obstacle = error.record
        discard = cell.warmup
        return _keep(answers, discard), _keep(beside, discard), obstacle

    def _child(self, module: str, task: dict[str, Any], cell: Cell, timeout: float | None = None) -> dict[str, Any]:
        dropped = None
        if cell.cache == "cold":
            dropped = drop_page_cache(self._files(cell))
        return run_child(module, task, cell.memory_limit_bytes, timeout) | {"page_cache_dropped": dropped}

    def _run_baseline(self, task: dict[str, Any], plan: dict[str, Any], cell: Cell) -> dict[str, Any]:
        self.offload_folder.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix="baseline-", dir=self.offload_folder)
        try:
            more = {
                "path": str(complete_checkpoint(self.checkpoint, Path(scratch))),
                "torch_dtype": resolve_dtype(plan["dtype"], plan["stored_dtype"]).compute.torch_name,
                "cpu_budget_bytes": plan["cpu_budget_bytes"],
                "scratch": scratch,
            }
            return self._child(_BASELINE, task | more, cell, self.baseline_timeout)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            os.sync()  # else the disk would still be busy with it while the next process is measured

    def _obstacle(self, cell: Cell) -> dict[str, Any] | None:
        if cell.baseline is None:
            return None
        if self.checkpoint.stored_dtype == "I8":
            message = "plain transformers keeps no model in 8 bit on disk"
            return {"kind": "model", "message": message, "hint": "", "exit_code": 5}
        if not self.checkpoint.repairs:
            return None
        message = "plain transformers cannot load this checkpoint: " + "; ".join(self.checkpoint.repairs)
        return {"kind": "model", "message": message, "hint": "", "exit_code": 5}

    def _files(self, cell: Cell) -> set[Path]:
        slices = [tensor for expert in self.checkpoint.experts.values() for tensor in expert]
        store = store_folder(self.offload_folder, model_name(self.checkpoint), cell.dtype)
        packed = {expert_path(store, key) for key, _ in stored_experts(store)}
        return packed | {tensor.file for tensor in [*slices, *self.checkpoint.dense.values()]}


def _keep(answers: list[Any], discard: int) -> list[Any]:
    """Leave out the fills that only warm up: whole processes of cold cells, the first fills of a warm one."""
    if len(answers) > 1:
        return answers[discard:]
    return [answer | {"fills": answer["fills"][discard:]} for answer in answers] if answers else []


def _describe(cell: Cell) -> str:
    memory = "" if cell.cpu_memory_bytes is None else f", {cell.cpu_memory_bytes / 2**30:.3g} GiB"
    return f"{cell.dtype}{memory}, batch {cell.batch_size}, {cell.cache}"


def _identity(knobs: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(knobs.items()))
