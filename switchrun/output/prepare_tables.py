"""What `switchrun prepare --dry-run` tells."""

from __future__ import annotations

import sys

from switchrun.output.consoles import make_list, render
from switchrun.planning.plan import Bandwidth
from switchrun.planning.preparation import Preparation
from switchrun.store import ExpertStore
from switchrun.units import format_bytes, format_rate, format_seconds


def render_preparation(
    store: ExpertStore, preparation: Preparation, jobs: int, memory_bytes: int, disk: Bandwidth, packing_seconds: float
) -> str:
    """Give the lines for stdout.

    Args:
        store: Where the experts would go.
        preparation: What would be done.
        jobs: How many experts would be worked on side by side.
        memory_bytes: What that takes.
        disk: How fast the disk is.
        packing_seconds: What quantising takes for one expert, with all jobs at work.
    """
    table = make_list("What switchrun prepare would do")
    table.add_row("model", store.manifest.model)
    table.add_row("dtype", store.manifest.dtype)
    table.add_row("folder", str(store.folder))
    table.add_row("experts to write", f"{len(preparation.todo)} of {format_bytes(preparation.file_bytes)}")
    table.add_row("stored already", str(len(preparation.stored)))
    if preparation.left_out:
        table.add_row("left out by --limit", str(preparation.left_out))
    table.add_row("bytes to write", format_bytes(preparation.write_bytes))
    table.add_row("free on the disk", format_bytes(preparation.free_bytes))
    table.add_row("jobs", f"{jobs}, in {format_bytes(memory_bytes)} of memory")
    table.add_row("disk", f"{format_rate(disk.bytes_per_second)} ({disk.source})")
    times = make_list("How long it would take, estimated")
    estimate = preparation.estimate(disk, packing_seconds)
    times.add_row("reading", format_seconds(estimate.reading))
    times.add_row("quantising", f"{format_seconds(estimate.packing)} (measured for half a second)")
    times.add_row("writing", f"{format_seconds(estimate.writing)} (if as fast as reading)")
    least, most = format_seconds(estimate.least), format_seconds(estimate.most)
    times.add_row("all of it", most if jobs == 1 else f"{least} to {most}")
    return render(sys.stdout, [table, times])
