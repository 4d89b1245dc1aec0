"""The planner: budgets and a checkpoint's headers in, a plan out; pure arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from switchrun.checkpoint.types import SwitchCheckpoint, TensorSlice
from switchrun.dtypes import Precision, resolve_dtype
from switchrun.errors import BudgetError
from switchrun.planning import memory
from switchrun.planning.budgets import Budgets
from switchrun.planning.device_map import SparseLayer, check_device_map, check_layers, computing_tiers, tier_of
from switchrun.planning.estimate import Bandwidth, GpuLevel, estimate_fill
from switchrun.planning.memory import Needs, module_of, needs_of
from switchrun.planning.placement import place, why
from switchrun.planning.plan import CPU, DISK, Placement, Plan, Tier, TierUse, gpu_tier, main_tier
from switchrun.units import format_bytes, mib_up

_SHARED = "shared.weight"


def make_plan(
    checkpoint: SwitchCheckpoint,
    budgets: Budgets,
    *,
    dtype: str = "auto",
    batch_size: int = 1,
    num_beams: int = 1,
    device_map: Mapping[str, Tier] | None = None,
    input_tokens: int = 24,
    output_tokens: int = 12,
    bandwidth: Bandwidth | None = None,
    stored_share: float = 0.0,
) -> Plan:
    """Decide where every weight goes.

    Dense weights get memory first, those of the decoder before the encoder's, since they are used for every token;
    what is left of each tier is divided into expert slots. Dense weights that find no place stay on disk.

    Args:
        checkpoint: The checkpoint, opened from its headers.
        budgets: Bytes allowed on each tier.
        dtype: `auto`, `fp32`, `bf16`, `int8` or `nf4`.
        batch_size: Inputs that run together.
        num_beams: Beams of each input.
        device_map: Where dense weights go, instead of the planner's own choice.
        input_tokens: Tokens of an input, for the estimate.
        output_tokens: Tokens generated, for the estimate; memory is reserved for more.
        bandwidth: Read bandwidth of the disk, for the estimate.
        stored_share: Which share of the experts lies in the offload folder, packed, for the estimate.

    Raises:
        BudgetError: The CPU budget is below the minimum, or the given map does not fit. A GPU's budget that is too
            small for the planner's own map is none: the plan's notes tell that the GPU is not used.
        UsageError: The dtype or the device map makes no sense.
    """
    precision = resolve_dtype(dtype, checkpoint.stored_dtype, checkpoint.plain_dtype)
    needs = needs_of(checkpoint, precision, batch_size, num_beams, output_tokens)
    if budgets.cpu_bytes < needs.minimum:
        raise BudgetError(
            f"{checkpoint.id} in {precision.name} needs at least {mib_up(needs.minimum)} of CPU memory, "
            f"{format_bytes(budgets.cpu_bytes)} is allowed",
            f"use --cpu-memory {mib_up(needs.minimum).replace(' ', '')} or more",
        )
    reason: dict[str, str]
    notes = budgets.notes
    if device_map is None:
        placed, unused = place(needs, budgets)
        notes += unused
        reason = {module: why(module, tier) for module, tier in placed.items()}
    else:
        check_device_map(device_map, checkpoint.dense)
        placed = {name: tier_of(name, device_map) for name in checkpoint.dense}
        check_layers(placed)
        reason = dict.fromkeys(placed, "by the given device map")
    full_map = _with_aliases(device_map or placed, checkpoint)
    sizes = _sizes(checkpoint, precision, placed)
    # Under another name a map may put the embedding on a second tier: that is a copy, and takes memory.
    for alias in _aliases(checkpoint):
        tier = tier_of(f"{alias}.weight", full_map)
        if tier != tier_of(_SHARED, full_map):
            placed[alias], reason[alias] = tier, "a copy of shared, by the given device map"
            sizes[alias] = _size(_SHARED, checkpoint.dense[_SHARED], precision, tier)
    dense: dict[Tier, int] = Counter()
    for module, tier in placed.items():
        dense[tier] += sizes[module]
    computing = computing_tiers(needs.sparse_layers, placed)
    passing = _largest_on_disk(checkpoint, precision, placed)
    tiers = tier_uses(needs, budgets, dense, passing, computing, needs.num_experts * checkpoint.expert_bytes)
    return Plan(
        model_id=checkpoint.id,
        revision=checkpoint.revision,
        path=str(checkpoint.path),
        precision=precision,
        stored_dtype=checkpoint.stored_dtype,
        repairs=checkpoint.repairs,
        num_experts=needs.num_experts,
        expert_bytes=checkpoint.expert_bytes,
        total_bytes=checkpoint.total_bytes,
        batch_size=batch_size,
        num_beams=num_beams,
        device_map=full_map,
        placements=tuple(Placement(m, t, sizes[m], reason[m]) for m, t in placed.items()),
        notes=notes,
        tiers=tiers,
        minimum_cpu_bytes=needs.minimum,
        resident_cpu_bytes=needs.resident,
        estimate=estimate_fill(
            checkpoint,
            batch_size=batch_size,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            expert_slots=tiers[-2].expert_slots,
            gpu_levels=[GpuLevel.of(use, computing) for use in tiers[:-2] if use.dense_bytes],
            dense_disk_bytes={m: sizes[m] for m, t in placed.items() if t == DISK},
            bandwidth=bandwidth,
            expert_bytes=memory.mean_load_bytes(checkpoint, precision, stored_share),
            kept_bytes=sum(memory.kept_parts(checkpoint, precision)),
        ),
    )


def _sizes(checkpoint: SwitchCheckpoint, precision: Precision, placed: Mapping[str, Tier]) -> dict[str, int]:
    """Give the bytes of every placed module or tensor on its tier: on disk as stored, elsewhere as it is kept."""
    sizes = dict.fromkeys(placed, 0)
    for name, tensor in checkpoint.dense.items():
        owner = name if name in sizes else module_of(name)
        sizes[owner] += _size(name, tensor, precision, placed[owner])
    return sizes


def _size(name: str, tensor: TensorSlice, precision: Precision, tier: Tier) -> int:
    return tensor.stored_bytes if tier == DISK else memory.dense_bytes(name, tensor, precision)


def _largest_on_disk(checkpoint: SwitchCheckpoint, precision: Precision, placed: Mapping[str, Tier]) -> int:
    def on_disk(*names: str) -> bool:
        return next(placed[name] for name in names if name in placed) == DISK

    sizes = [
        memory.dense_bytes(name, tensor, precision)
        for name, tensor in checkpoint.dense.items()
        if on_disk(name, module_of(name))
    ]
    if any(placed.get(alias) == DISK for alias in _aliases(checkpoint)):
        sizes.append(memory.dense_bytes(_SHARED, checkpoint.dense[_SHARED], precision))
    return max(sizes, default=0)


def _aliases(checkpoint: SwitchCheckpoint) -> list[str]:
    """Give the other names that `shared` goes by in this model."""
    names = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
    return [name for name in names if f"{name}.weight" not in checkpoint.dense]


def _with_aliases(device_map: Mapping[str, Tier], checkpoint: SwitchCheckpoint) -> dict[str, Tier]:
    """Add the names that `shared` also goes by, so that accelerate finds an entry for every module."""
    result = dict(device_map)
    for alias in _aliases(checkpoint):
        result.setdefault(alias, tier_of(_SHARED, device_map))
    return result


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
    main = main_tier(tier for tier, size in dense.items() if size)
    uses = []
    for number in sorted({*budgets.gpu_bytes, *(tier.gpu for tier in dense if tier.gpu is not None)}):
        tier = gpu_tier(number)
        extra = memory.GPU_LIBRARY_BYTES + (passing if tier == main else 0)
        budget = budgets.gpu_bytes.get(number)
        uses.append(_gpu_use(needs, tier, budget, dense.get(tier, 0), extra, usable.get(tier, 0)))
    uses.append(_cpu_use(needs, budgets.cpu_bytes, dense.get(CPU, 0), passing))
    uses.append(_use(DISK, None, dense=dense.get(DISK, 0), experts=stored_bytes))
    return tuple(uses)


def _use(
    tier: Tier,
    budget: int | None,
    *,
    dense: int = 0,
    slots: int = 0,
    slot: int = 0,
    experts: int = 0,
    activations: int = 0,
    overhead: int = 0,
) -> TierUse:
    return TierUse(
        tier=tier,
        budget_bytes=budget,
        dense_bytes=dense,
        expert_slots=slots,
        slot_bytes=slot,
        expert_bytes=experts,
        activation_bytes=activations,
        overhead_bytes=overhead,
        total_bytes=dense + experts + activations + overhead,
    )


def _gpu_use(needs: Needs, tier: Tier, budget: int | None, dense: int, overhead: int, usable: int) -> TierUse:
    """Return a GPU's use; a GPU without dense weights is not used at all, and one without a budget for few slots only.

    Raises:
        BudgetError: The budget is too small for the dense weights and a slot.
    """
    if not dense:
        return _use(tier, budget, slot=needs.gpu_slot)
    fixed = dense + needs.activations + overhead
    slots = min(usable, memory.GPU_RESERVED_SLOTS)
    if budget is not None:
        least = fixed + min(usable, 1) * needs.gpu_slot
        if least > budget:
            raise BudgetError(f"the device map needs {mib_up(least)} on {tier}, {format_bytes(budget)} is allowed")
        slots = min(usable, (budget - fixed) // needs.gpu_slot)
    return _use(
        tier,
        budget,
        dense=dense,
        slots=slots,
        slot=needs.gpu_slot,
        experts=slots * needs.gpu_slot,
        activations=needs.activations,
        overhead=overhead,
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
    return _use(
        CPU,
        budget,
        dense=dense,
        slots=slots,
        slot=needs.slot,
        experts=slots * needs.slot,
        activations=needs.activations,
        overhead=needs.overhead + passing,
    )


def fit_to_runtime(plan: Plan, checkpoint: SwitchCheckpoint, rss_bytes: int, own_bytes: int = 0) -> Plan:
    """Give up slots where the process is already larger than the plan reserved for it.

    Args:
        plan: The plan.
        checkpoint: What was planned for; its index is in memory.
        rss_bytes: The process's resident set, the libraries loaded and no weight yet.
        own_bytes: How much of it the caller had, before the model was opened.

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
    slots = use.expert_slots + (spare - surplus) // use.slot_bytes
    if slots < 1:
        missing = surplus - spare - (use.expert_slots - 1) * use.slot_bytes
        if own_bytes > surplus // 2:
            message = (
                f"this process held {format_bytes(own_bytes)} before the model was opened, and the budget counts it"
            )
        else:
            message = f"the libraries take {format_bytes(surplus)} more memory here than planned"
        hint = f"raise --cpu-memory by {format_bytes(missing)}" + (", or give --gpu-memory 0" if plan.gpus else "")
        raise BudgetError(message, hint)
    fewer = use.with_slots(slots)
    overhead, total = use.overhead_bytes + surplus, fewer.total_bytes + surplus
    return plan.with_use(replace(fewer, overhead_bytes=overhead, total_bytes=total))
