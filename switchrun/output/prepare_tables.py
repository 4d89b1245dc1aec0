"""What `switchrun prepare --dry-run` tells."""

from __future__ import annotations

import sys

from switchrun.output.consoles import make_list, render
from switchrun.planning.estimate import Bandwidth
from switchrun.planning.preparation import Preparation
from switchrun.store import ExpertStore
from switchrun.units import format_bytes, format_rate, format_seconds


def render_preparation(
    store: ExpertStore, preparation: Preparation, jobs: int, memory_bytes: int, disk: Bandwidth
) -> str:
    """Give the lines for stdout.

    Args:
        store: Where the experts would go.
        preparation: What would be done.
        jobs: How many experts would be worked on side by side.
        memory_bytes: What that takes.
        disk: How fast the disk is.
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
    table.add_row("reading and writing takes", format_seconds(preparation.disk_seconds(disk)))
    return render(sys.stdout, [table])
