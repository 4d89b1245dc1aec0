"""What each tier holds once every dense weight has its place: the rest becomes slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from switchrun.errors import BudgetError
from switchrun.planning import memory
from switchrun.planning.budgets import Budgets
from switchrun.planning.device_map import SparseLayer
from switchrun.planning.needs import Needs
from switchrun.planning.types import Tier, TierUse, tier_name
from switchrun.units import format_bytes, mib_up


def tier_uses(
    needs: Needs,
    budgets: Budgets,
    dense: Mapping[Tier, int],
    passing: int,
    computing: Mapping[SparseLayer, Tier],
    stored_bytes: int,
) -> tuple[TierUse, ...]:
    """Divide what the tiers have left into slots.

    Args:
        needs: What the model needs.
        budgets: Bytes allowed on each tier.
        dense: Tier → bytes of the dense weights there.
        passing: The largest dense tensor that stays on disk, 0 if none does.
        computing: Sparse layer → tier on which its experts compute.
        stored_bytes: All experts as they are stored.

    Returns:
        The GPUs that have a budget or weights, in their order; the CPU; the disk.

    Raises:
        BudgetError: A tier is too small for what was placed there.
    """
    usable = {tier: layers * needs.experts_per_layer for tier, layers in Counter(computing.values()).items()}
    main = min((tier for tier, size in dense.items() if isinstance(tier, int) and size), default=None)
    uses = []
    for number in sorted({*budgets.gpu_bytes, *(tier for tier in dense if isinstance(tier, int))}):
        weights, budget = dense.get(number, 0), budgets.gpu_bytes.get(number)
        extra = memory.GPU_LIBRARY_BYTES + (passing if number == main else 0)
        uses.append(_gpu_use(needs, number, budget, weights, extra, usable.get(number, 0)))
    uses.append(_cpu_use(needs, budgets.cpu_bytes, dense.get("cpu", 0), passing))
    disk = dense.get("disk", 0)
    uses.append(TierUse("disk", None, disk, 0, 0, stored_bytes, 0, 0, disk + stored_bytes))
    return tuple(uses)


def _gpu_use(needs: Needs, number: int, budget: int | None, dense: int, overhead: int, usable: int) -> TierUse:
    """Give a GPU's use; a GPU without dense weights is not used at all, and one without a budget for few slots only.

    Raises:
        BudgetError: The budget is too small for the dense weights and a slot.
    """
    if not dense:
        return TierUse(tier_name(number), budget, 0, 0, needs.gpu_slot, 0, 0, 0, 0)
    fixed = dense + needs.activations + overhead
    slots = min(usable, memory.GPU_RESERVED_SLOTS)
    if budget is not None:
        least = fixed + min(usable, 1) * needs.gpu_slot
        if least > budget:
            raise BudgetError(
                f"the device map needs {mib_up(least)} on gpu:{number}, {format_bytes(budget)} is allowed"
            )
        slots = min(usable, (budget - fixed) // needs.gpu_slot)
    experts = slots * needs.gpu_slot
    return TierUse(
        tier_name(number), budget, dense, slots, needs.gpu_slot, experts, needs.activations, overhead, fixed + experts
    )


def _cpu_use(needs: Needs, budget: int, dense: int, passing: int) -> TierUse:
    """Give the CPU's use; its slots are the level behind those of all GPUs.

    Raises:
        BudgetError: Not a single slot is left.
    """
    fixed = needs.fixed + dense + passing
    slots = min((budget - fixed) // needs.slot, needs.num_experts)
    if slots < 1:
        raise BudgetError(
            f"the device map needs {mib_up(fixed + needs.slot)} of CPU memory, {format_bytes(budget)} is allowed"
        )
    experts = slots * needs.slot
    overhead = needs.overhead + passing
    return TierUse("cpu", budget, dense, slots, needs.slot, experts, needs.activations, overhead, fixed + experts)
