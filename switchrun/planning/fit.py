"""The plan's last word: what the libraries really take on this machine."""

from __future__ import annotations

from dataclasses import replace

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.errors import BudgetError
from switchrun.planning import memory
from switchrun.planning.types import Plan
from switchrun.units import format_bytes


def fit_to_runtime(plan: Plan, checkpoint: SwitchCheckpoint, rss_bytes: int) -> Plan:
    """Give up slots where the process is already larger than the plan reserved for it.

    Args:
        plan: The plan.
        checkpoint: What was planned for; its index is in memory.
        rss_bytes: The process's resident set, the libraries loaded and no weight yet.

    Returns:
        The plan, with fewer slots if need be.

    Raises:
        BudgetError: Not a single slot would be left.
    """
    use = plan.tier("cpu")
    expected = memory.runtime_bytes(plan.precision) - memory.FIRST_RUN_BYTES
    expected += memory.index_bytes(checkpoint)
    surplus = rss_bytes - expected
    spare = (use.budget_bytes or 0) - use.total_bytes
    if surplus <= spare:
        return plan
    given_up = -(-(surplus - spare) // use.slot_bytes)
    slots = use.expert_slots - given_up
    if slots < 1:
        missing = surplus - spare - (use.expert_slots - 1) * use.slot_bytes
        raise BudgetError(
            f"the libraries take {format_bytes(surplus)} more memory here than planned",
            f"raise --cpu-memory by {format_bytes(missing)}" + (", or give --gpu-memory 0" if plan.gpus else ""),
        )
    smaller = replace(
        use,
        expert_slots=slots,
        expert_bytes=slots * use.slot_bytes,
        overhead_bytes=use.overhead_bytes + surplus,
        total_bytes=use.total_bytes - given_up * use.slot_bytes + surplus,
    )
    return replace(plan, tiers=tuple(smaller if tier is use else tier for tier in plan.tiers))
