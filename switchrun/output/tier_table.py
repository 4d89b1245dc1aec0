"""What each tier holds, as a table: shown of a plan and of a session."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from switchrun.output.consoles import make_table
from switchrun.planning.plan import TierUse
from switchrun.units import format_bytes


def tier_table(uses: Iterable[TierUse]) -> Table:
    """Give the table; 80 columns hold it."""
    table = make_table(
        "Memory of each tier", "tier", "dense", "experts", "slots", "activ.", "overhead", "total", "budget"
    )
    for use in uses:
        table.add_row(
            use.tier,
            format_bytes(use.dense_bytes),
            format_bytes(use.expert_bytes),
            str(use.expert_slots) if use.expert_slots else "",
            format_bytes(use.activation_bytes),
            format_bytes(use.overhead_bytes),
            format_bytes(use.total_bytes),
            "" if use.budget_bytes is None else format_bytes(use.budget_bytes),
        )
    return table
