"""What to say when the memory of a GPU runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from switchrun.errors import BudgetError
from switchrun.experts import accelerator
from switchrun.planning.types import Plan, TierUse, tier_name
from switchrun.units import MIB, format_bytes

#: Of what this process could have on a GPU, and of a budget that was too large, this share is tried next.
_OF_AVAILABLE = 0.9
_OF_BUDGET = 0.75


@contextlib.contextmanager
def told_as_budget(plan: Plan) -> Iterator[None]:
    """Turn a GPU's out-of-memory error into one that says what to do.

    Raises:
        BudgetError: The memory of a GPU ran out.
    """
    try:
        yield
    except RuntimeError as error:
        if not plan.gpus or not accelerator.is_out_of_memory(error):
            raise
        raise _out_of_memory({number: plan.tier(tier_name(number)) for number in plan.gpus}) from error


def _out_of_memory(uses: Mapping[int, TierUse]) -> BudgetError:
    """Name the GPU that has the least left, and smaller budgets than the plan's."""
    found = {}
    with contextlib.suppress(RuntimeError):  # a driver without memory may not even tell how much it has
        found = {number: accelerator.memory_in_use(number) for number in uses}
    budgets = {number: use.budget_bytes or use.total_bytes for number, use in uses.items()}
    if not found:
        return BudgetError("a GPU is out of memory", _try({n: int(size * _OF_BUDGET) for n, size in budgets.items()}))
    number, (allocated, free) = min(found.items(), key=lambda item: item[1][1])
    smaller = int(min((allocated + free) * _OF_AVAILABLE, budgets[number] * _OF_BUDGET))
    return BudgetError(
        f"gpu:{number} is out of memory: of the {format_bytes(budgets[number])} that are allowed, switchrun has "
        f"{format_bytes(allocated)}, and {format_bytes(free)} are free",
        _try(budgets | {number: smaller}),
    )


def _try(budgets: Mapping[int, int]) -> str:
    sizes = [f"{number}={size // MIB}MiB" for number, size in sorted(budgets.items()) if size >= MIB]
    return f"try --gpu-memory {','.join(sizes) or '0'}, or close other programs that use the GPU"
