"""`switchrun prepare`: quantises experts into the offload folder ahead of time."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from switchrun.checkpoint.types import HubWay
from switchrun.cli import options
from switchrun.cli.downloads import shown_opening
from switchrun.cli.help import Panel
from switchrun.cli.signals import SIGNALS, Interrupted
from switchrun.cli.startup import quieten_libraries
from switchrun.cli.streams import report, write_answer
from switchrun.dtypes import PackedDtype, resolve_dtype
from switchrun.errors import UsageError
from switchrun.kernels import libraries
from switchrun.machine.limits import check_limits
from switchrun.output.progress import ByteProgress
from switchrun.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from switchrun.checkpoint.remote import HubRanges
    from switchrun.checkpoint.types import ExpertKey, SwitchCheckpoint
    from switchrun.experts.packing import ExpertPacker
    from switchrun.planning.preparation import PreparedCounts
    from switchrun.store import ExpertStore


def prepare(
    dtype: Annotated[PackedDtype, typer.Option("--dtype", help="What fill will compute the experts in.")],
    model: options.Model = None,
    hub: options.Hub = HubWay.AUTO,
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            show_default="all",
            rich_help_panel=Panel.MODEL,
            help="Only these layers, like encoder.1,decoder.3-7.",
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            show_default="all",
            rich_help_panel=Panel.MODEL,
            help="Only these experts of each layer, like 0-15,20.",
        ),
    ] = None,
    limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            show_default="no limit",
            rich_help_panel=Panel.MEMORY,
            help="Most that the model's stored experts may take on disk; those beyond it are left out.",
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default="one a core, as memory allows",
            rich_help_panel=Panel.MEMORY,
            help="Experts quantised side by side.",
        ),
    ] = None,
    cpu_memory: options.CpuMemory = None,
    offload_folder: options.OffloadFolder = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; store nothing.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read what is stored already, and write it again where it is damaged.")
    ] = False,
) -> None:
    """Quantise experts into the offload folder ahead of time.

    It may be stopped at any time: the same command goes on from there.

    Examples:
        switchrun prepare --dtype int8 --model google/switch-base-8
        switchrun prepare --dtype nf4 --layers encoder,decoder.0-3 --dry-run
        switchrun prepare --dtype int8 -m google/switch-c-2048 --limit 200GB
    """
    from switchrun.planning import preparation as planning
    from switchrun.planning.budgets import parse_size, resolve_budgets
    from switchrun.planning.memory import packed_layout
    from switchrun.planning.opening import disk_of, find_kept, measure_disk, network_of, open_model
    from switchrun.planning.options import OpenOptions
    from switchrun.store import open_checkpoint_store

    started = time.perf_counter()
    opening = OpenOptions(
        model=model,
        dtype=dtype.value,
        cpu_memory=cpu_memory,
        gpu_memory=0,
        offload_folder=offload_folder,
        hub=hub.value,
    )
    limit_bytes = None if limit is None else parse_size("limit", limit)
    budgets = resolve_budgets(opening.cpu_bytes, 0)
    # Threads warn, and the main thread reports it: it alone knows of the progress line.
    warnings: deque[str] = deque()
    with shown_opening(opening, quiet=False) as (steps, _):
        checkpoint, ranges = open_model(opening, warnings.append, steps)
    resolve_dtype(dtype, checkpoint.stored_dtype, checkpoint.plain_dtype)
    if checkpoint.reads_int8_in_place:
        raise UsageError(f"{checkpoint.id} is stored in int8, so there is nothing to prepare", "fill reads it in place")
    chosen = planning.choose_experts(checkpoint, layers, experts)
    layout = packed_layout(checkpoint, dtype)
    jobs = planning.resolve_jobs(checkpoint, layout, jobs, budgets.cpu_bytes)
    store = open_checkpoint_store(
        opening.folder, checkpoint, dtype, read_only=dry_run, must_write=not dry_run, warn=warnings.append
    )
    preparation = planning.make_preparation(checkpoint, store, chosen, limit_bytes)
    _report_all(warnings)
    if dry_run:
        from switchrun.output.tables import render_preparation

        packing_seconds = 0.0
        if preparation.todo:
            measure_disk(checkpoint, find_kept(checkpoint, opening))
            packing_seconds = _preparer(checkpoint, ranges, store, jobs).packing_seconds(preparation.todo[0])
        memory = planning.process_bytes(checkpoint, layout, jobs)
        disk, network = disk_of(checkpoint, opening.folder), network_of(opening) if ranges else None
        write_answer(render_preparation(store, preparation, jobs, memory, disk, packing_seconds, network))
        return
    planning.check_room(preparation, store.folder)
    keys = [*preparation.todo, *(preparation.stored if verify else ())]
    done = planning.PreparedCounts(0, 0, 0)
    if keys:
        done = _run(_preparer(checkpoint, ranges, store, jobs, verify), keys, warnings)
    skipped = done.skipped + (0 if verify else len(preparation.stored))
    rebuilt = done.rebuilt + preparation.damaged
    written = format_count(done.written, "expert")
    parts = [f"{written} written", f"{skipped} skipped", format_bytes(done.written * store.file_bytes)]
    if rebuilt:
        parts.insert(1, f"{rebuilt} in the place of {'a damaged one' if rebuilt == 1 else 'damaged ones'}")
    if preparation.left_out:
        parts.append(f"{preparation.left_out} left out by --limit")
    write_answer(f"{', '.join(parts)}, {format_seconds(time.perf_counter() - started)}\n")


def _preparer(
    checkpoint: SwitchCheckpoint, ranges: HubRanges | None, store: ExpertStore, jobs: int, verify: bool = False
) -> ExpertPacker:
    """Import torch, which takes seconds: what is wrong with options, model or budget has been said by now."""
    quieten_libraries()
    check_limits()
    libraries.path()  # refuses one that this machine does not have
    with SIGNALS.at_once():
        from switchrun.experts.packing import ExpertPacker

    return ExpertPacker(checkpoint, store, jobs, verify, ranges)


def _run(preparer: ExpertPacker, keys: Sequence[ExpertKey], warnings: deque[str]) -> PreparedCounts:
    progress = ByteProgress(sys.stderr, "prepare")

    def on_bytes(done: int, total: int) -> None:
        if warnings:
            progress.clear()
            _report_all(warnings)
        progress(done, total)

    try:
        return preparer.run(keys, on_bytes)
    except Interrupted:
        progress.clear()
        report("stopped; what is stored stays, and the same command goes on from there")
        raise
    finally:
        progress.clear()
        _report_all(warnings)


def _report_all(warnings: deque[str]) -> None:
    while warnings:
        report(f"warning: {warnings.popleft()}")
