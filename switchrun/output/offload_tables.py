"""What an offload folder holds, as tables to read."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from switchrun.output.consoles import make_table, render
from switchrun.store.upkeep import StoreInfo, VerifyReport
from switchrun.units import format_bytes


def render_stores(offload: Path, stores: Sequence[StoreInfo]) -> str:
    """Give the stores as lines for stdout."""
    if not stores:
        return f"{offload} holds no stored experts\n"
    table = make_table(f"Stored experts in {offload}", "model", "dtype", "problem", "experts", "bytes", text_columns=3)
    for info in stores:
        table.add_row(_model(info), info.folder.name, info.problem, str(info.experts), format_bytes(info.nbytes))
    return render(sys.stdout, [table])


def render_verified(offload: Path, verified: Iterable[tuple[StoreInfo, VerifyReport]]) -> str:
    """Give what was verified as lines for stdout."""
    table = make_table(f"Verified in {offload}", "model", "dtype", "experts", "bytes", "damaged", text_columns=2)
    for info, found in verified:
        damaged = str(len(found.damaged))
        table.add_row(_model(info), info.folder.name, str(found.experts), format_bytes(found.nbytes), damaged)
    return render(sys.stdout, [table])


def _model(info: StoreInfo) -> str:
    """What the user called it; where that cannot be read, the folder that is named after it."""
    return info.manifest.model if info.manifest else info.folder.parent.name
