"""The planner: budgets and a checkpoint's headers in, a plan out; pure arithmetic.

Dense weights are placed first, then what is left of each tier becomes expert slots, then a fill's cost is estimated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.dtypes import resolve_dtype
from switchrun.errors import BudgetError
from switchrun.planning import memory
from switchrun.planning.budgets import Budgets
from switchrun.planning.device_map import SHARED_ALIASES, check_device_map, check_layers, computing_tiers, tier_of
from switchrun.planning.memory import Needs, module_of, needs_of
from switchrun.planning.plan import (
    ASSUMED_BANDWIDTH,
    CPU,
    DISK,
    HUB,
    Bandwidth,
    BatchSize,
    Estimate,
    HubCost,
    HubState,
    Placement,
    Plan,
    SparseLayer,
    Tier,
    TierUse,
    gpu_tier,
    main_tier,
    sure_rows,
)
from switchrun.units import format_bytes, mib_up

_SHARED = "shared.weight"


def make_plan(
    checkpoint: SwitchCheckpoint,
    budgets: Budgets,
    *,
    dtype: str = "auto",
    batch_size: BatchSize = 1,
    num_beams: int = 1,
    device_map: Mapping[str, Tier] | None = None,
    input_tokens: int = 24,
    output_tokens: int = 12,
    bandwidth: Bandwidth = ASSUMED_BANDWIDTH,
    stored_share: float = 0.0,
    hub: HubState | None = None,
    hub_output_tokens: int | None = None,
) -> Plan:
    """Decide where every weight goes: by the planner's own choice, or by a device map.

    Tokens, the disk's bandwidth and the share of the experts that lies packed in the offload folder are for the
    estimate; memory is reserved for as many new tokens as the longest input has, or for `output_tokens` if more. `hub`
    is for a checkpoint that is read from the Hub, and `hub_output_tokens` for what that is expected to cost, if they
    are not `output_tokens`.

    Raises:
        BudgetError: The CPU budget is below the minimum, or the given map does not fit. A GPU that is too small for
            the planner's own map is left out, and the plan's notes say so.
        UsageError: The dtype or the device map makes no sense.
    """
    precision = resolve_dtype(dtype, checkpoint.stored_dtype, checkpoint.plain_dtype)
    rows = sure_rows(batch_size)
    needs = needs_of(checkpoint, precision, batch_size, num_beams, output_tokens)
    if budgets.cpu_bytes < needs.minimum:
        raise BudgetError(
            f"{checkpoint.id} in {precision.name} needs at least {mib_up(needs.minimum)} of CPU memory, "
            f"{format_bytes(budgets.cpu_bytes)} is allowed",
            f"use --cpu-memory {mib_up(needs.minimum).replace(' ', '')} or more",
        )

    # A tier for each dense tensor.
    notes = budgets.notes
    chosen: Mapping[str, Tier]
    if device_map is None:
        chosen, unused = _place(needs, budgets)
        notes += unused
    else:
        check_device_map(device_map, checkpoint.dense)
        chosen = device_map
    placed = {name: tier_of(name, chosen) for name in checkpoint.dense}
    check_layers(placed)
    aliases = [name for name in SHARED_ALIASES if f"{name}.weight" not in checkpoint.dense]
    full_map = {**chosen, **{alias: placed[_SHARED] for alias in aliases if alias not in chosen}}
    weights = dict(checkpoint.dense)
    # Under another name a map may put the embedding on a second tier: that is a copy, and takes memory.
    for alias in aliases:
        tier = tier_of(f"{alias}.weight", full_map)
        if tier != placed[_SHARED]:
            placed[alias], weights[alias] = tier, weights[_SHARED]

    # What that takes: on disk as stored, elsewhere as it is kept.
    in_memory = {name: memory.dense_bytes(name, tensor, precision) for name, tensor in weights.items()}
    kept = {name: weights[name].stored_bytes if placed[name] == DISK else in_memory[name] for name in weights}
    if device_map is None:
        sizes = Counter[str]()
        for name, size in kept.items():
            sizes[module_of(name)] += size
        placements = [Placement(module, tier, sizes[module], _why(module, tier)) for module, tier in chosen.items()]
    else:
        reasons = dict.fromkeys(aliases, "a copy of shared, by the given device map")
        placements = [
            Placement(name, tier, kept[name], reasons.get(name, "by the given device map"))
            for name, tier in placed.items()
        ]

    # What is left becomes slots.
    computing = computing_tiers(needs.sparse_layers, placed)
    passing = max((in_memory[name] for name, tier in placed.items() if tier == DISK), default=0)
    gpus, cpu = _divide(needs, budgets, placements, passing, computing)
    stored = needs.num_experts * checkpoint.mean_expert_bytes
    disk = TierUse(DISK, None, dense_bytes=sum(each.bytes for each in placements if each.tier == DISK))
    layers = Counter((tier, stack) for (stack, _), tier in computing.items())
    cost, fetched = None, 0.0
    if hub is not None:
        cost = hub_cost(checkpoint, hub, rows, input_tokens, hub_output_tokens or output_tokens)
        if cost.disk_bytes > cost.free_bytes:
            need, free = format_bytes(cost.disk_bytes), format_bytes(cost.free_bytes)
            notes += (f"{hub.folder} has {free} free, keeping what comes from the Hub takes {need}",)
    if hub is None or cost is None or cost.downloads:
        slow = [replace(disk, expert_bytes=round(stored))]
    else:
        left = 1 - cost.kept_share
        fetched = left * _used_experts(checkpoint, rows, input_tokens, output_tokens)
        stored_share = 1.0  # what is read from disk is what is kept
        on_hub = TierUse(HUB, None, dense_bytes=cost.dense_bytes, expert_bytes=round(left * stored))
        slow = [replace(disk, expert_bytes=hub.kept_bytes), on_hub]
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
        placements=tuple(placements),
        notes=notes,
        tiers=(*gpus, cpu, *slow),
        minimum_cpu_bytes=needs.minimum,
        resident_cpu_bytes=needs.resident,
        estimate=estimate_fill(
            checkpoint,
            batch_size=rows,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            expert_slots=cpu.expert_slots,
            gpu_levels=[
                GpuLevel(use.expert_slots, layers[use.tier, "encoder"], layers[use.tier, "decoder"])
                for use in gpus
                if use.dense_bytes
            ],
            dense_disk_bytes={each.module: each.bytes for each in placements if each.tier == DISK},
            bandwidth=bandwidth,
            expert_bytes=memory.mean_load_bytes(checkpoint, precision, stored_share),
            kept_bytes=sum(memory.kept_parts(checkpoint, precision)),
            fetched=fetched,
        ),
        hub=cost,
    )


def _why(module: str, tier: Tier) -> str:
    use = "used once for each batch" if module.startswith("encoder") else "used for every generated token"
    return f"{use}; no room in memory" if tier == DISK else use


def _place(needs: Needs, budgets: Budgets) -> tuple[dict[str, Tier], tuple[str, ...]]:
    """Fill the tiers from fast to slow with the modules, in the order in which they deserve fast memory.

    A GPU is used only if experts compute there: not if it is too small for that or no sparse layer is left for it, nor
    if the GPUs before it hold every weight. Returns module → tier, and a sentence on each GPU that is not used.
    """
    # What a GPU has for weights, slots included.
    rooms = {number: size - needs.gpu_fixed for number, size in sorted(budgets.gpu_bytes.items())}
    everything = sum(needs.groups.values()) + needs.num_experts * needs.gpu_slot
    notes: dict[int, str] = {}
    while True:
        held_before = accumulate((max(0, room) for room in rooms.values()), initial=0)
        used = {number: rooms[number] for number, held in zip(rooms, held_before, strict=False) if held < everything}
        placed = _fill(needs, used, budgets.cpu_bytes)
        computing = set(computing_tiers(needs.sparse_layers, placed).values())
        idle = [number for number in used if gpu_tier(number) not in computing]
        if not idle:
            break
        least = min(idle, key=rooms.__getitem__)
        del rooms[least]
        budget, minimum = budgets.gpu_bytes[least], needs.gpu_minimum
        notes[least] = "no layer with experts is left for it"
        if budget < minimum:
            notes[least] = f"a layer with experts needs {mib_up(minimum)} there, {format_bytes(budget)} is allowed"
    notes |= {number: "the GPUs before it hold every weight" for number in rooms if number not in used}
    return placed, tuple(f"gpu:{number} is not used: {why}" for number, why in sorted(notes.items()))


def _fill(needs: Needs, gpu_rooms: Mapping[int, int], cpu_bytes: int) -> dict[str, Tier]:
    """Fill the tiers, with room set aside for slots, and for what stays on disk, if anything does."""
    gpus = {number: max(0, room - needs.reserved_gpu_slots) for number, room in gpu_rooms.items()}
    cpu = cpu_bytes - needs.fixed - needs.reserved_slots
    placed = _fill_rooms(needs, gpus, cpu)
    if DISK not in placed.values():
        return placed
    # It passes through CPU memory, and through the first GPU, which computes with it, a tensor at a time.
    for number in list(gpus)[:1]:
        gpus[number] = max(0, gpus[number] - needs.largest_tensor)
    return _fill_rooms(needs, gpus, cpu - needs.largest_tensor)


def _fill_rooms(needs: Needs, gpu_rooms: Mapping[int, int], cpu_room: int) -> dict[str, Tier]:
    """Fill the tiers one after another; once a module did not fit on a tier, no later one goes there.

    If GPUs hold all dense weights together, blocks are spread over them in proportion to their room, each with its
    experts: so each GPU has as much left for slots as its layers want.
    """
    experts = needs.experts_per_layer * needs.gpu_slot
    weights = {module: size + experts * (module in needs.sparse_modules) for module, size in needs.groups.items()}
    total, together = sum(weights.values()), sum(gpu_rooms.values())
    spread = sum(needs.groups.values()) <= together
    # Tier, its room, and where its share of all weights ends.
    levels: list[tuple[Tier, int, int]] = [
        (gpu_tier(number), room, total * upto // together if spread else total)
        for (number, room), upto in zip(gpu_rooms.items(), accumulate(gpu_rooms.values()), strict=True)
    ]
    levels.append((CPU, cpu_room, total))
    placed: dict[str, Tier] = {}
    taken = begin = 0
    for module, size in needs.groups.items():
        # A module belongs to the tier in whose share its middle lies.
        while levels and (begin + weights[module] / 2 > levels[0][2] or taken + size > levels[0][1]):
            levels.pop(0)
            taken = 0
        placed[module] = levels[0][0] if levels else DISK
        taken += size
        begin += weights[module]
    return placed


def _divide(
    needs: Needs,
    budgets: Budgets,
    placements: Iterable[Placement],
    passing: int,
    computing: Mapping[SparseLayer, Tier],
) -> tuple[list[TierUse], TierUse]:
    """Divide what memory has left into slots, and return the GPUs that have a budget or weights, and the CPU.

    With a batch size of `auto` a part becomes room for more rows instead, the same on each device that computes.
    `passing` is the largest dense tensor that stays on disk and is brought in for each use, `computing` the tier on
    which the experts of each sparse layer compute.
    """
    dense = Counter[Tier]()
    for placement in placements:
        dense[placement.tier] += placement.bytes
    layers, main = Counter(computing.values()), main_tier(dense)
    gpus, usable = [], {CPU: needs.num_experts}
    for number in sorted({*budgets.gpu_bytes, *(tier.gpu for tier in dense if tier.gpu is not None)}):
        tier = gpu_tier(number)
        use = TierUse(tier, budgets.gpu_bytes.get(number), slot_bytes=needs.gpu_slot)
        if tier in dense:
            usable[tier] = layers[tier] * needs.experts_per_layer
            overhead = memory.GPU_LIBRARY_BYTES + (passing if tier == main else 0)
            use = replace(use, dense_bytes=dense[tier], activation_bytes=needs.activations, overhead_bytes=overhead)
        gpus.append(use)
    cpu = TierUse(
        CPU,
        budgets.cpu_bytes,
        dense_bytes=dense[CPU],
        slot_bytes=needs.slot,
        activation_bytes=needs.activations,
        overhead_bytes=needs.overhead + passing,
    )
    shares = [_for_rows(use, usable[use.tier]) for use in (*gpus, cpu) if use.tier in usable]
    activations = needs.activations + min(needs.most_activations - needs.activations, *shares)
    cpu = replace(cpu, activation_bytes=activations)
    slots = min((budgets.cpu_bytes - cpu.total_bytes) // needs.slot, needs.num_experts)
    if slots < 1:
        least = cpu.total_bytes + needs.slot
        raise BudgetError(
            f"the device map needs {mib_up(least)} of CPU memory, {format_bytes(budgets.cpu_bytes)} is allowed"
        )
    for at, use in enumerate(gpus):
        if use.tier in usable:
            gpus[at] = _with_gpu_slots(replace(use, activation_bytes=activations), usable[use.tier])
    return gpus, cpu.with_slots(slots)


def _for_rows(use: TierUse, usable: int) -> int:
    """Return how much of a tier's memory is worth more as room for the rows of a batch than as slots.

    All that is left if there is a slot for each usable expert. Else a half: let a step of the decoder use D experts,
    whatever the rows, and S of them be in slots; it reads (D - S) / rows for an input, and no division of the memory
    between rows and slots makes that less than half of what this one does.
    """
    free = (use.budget_bytes or 0) - use.total_bytes
    spare = free - usable * use.slot_bytes
    reserved = memory.RESERVED_SLOTS if use.tier == CPU else memory.GPU_RESERVED_SLOTS
    return spare if spare >= 0 else max(0, (free - min(reserved, usable) * use.slot_bytes) // 2)


def _with_gpu_slots(use: TierUse, usable: int) -> TierUse:
    """Add as many slots as the budget leaves room for, at most the usable ones; few to a GPU without a budget."""
    if use.budget_bytes is None:
        return use.with_slots(min(usable, memory.GPU_RESERVED_SLOTS))
    least = use.total_bytes + min(usable, 1) * use.slot_bytes
    if least > use.budget_bytes:
        raise BudgetError(
            f"the device map needs {mib_up(least)} on {use.tier}, {format_bytes(use.budget_bytes)} is allowed"
        )
    return use.with_slots(min(usable, (use.budget_bytes - use.total_bytes) // use.slot_bytes))


@dataclass(frozen=True, slots=True)
class GpuLevel:
    """A GPU's part of the cache: its slots, and how many sparse layers of each stack compute there."""

    slots: int
    encoder_layers: int
    decoder_layers: int


def estimate_fill(
    checkpoint: SwitchCheckpoint,
    *,
    batch_size: int,
    input_tokens: int,
    output_tokens: int,
    expert_slots: int,
    dense_disk_bytes: Mapping[str, int],
    gpu_levels: Sequence[GpuLevel] = (),
    bandwidth: Bandwidth = ASSUMED_BANDWIDTH,
    expert_bytes: float | None = None,
    kept_bytes: int = 0,
    fetched: float = 0.0,
) -> Estimate:
    """Estimate the first fill of a session, with nothing in the cache yet.

    CPU memory has `expert_slots`, the GPUs' slots are in front of them. An expert takes `expert_bytes` to read (None is
    as stored), and `kept_bytes` to copy to a GPU. `dense_disk_bytes` is what stays on disk, by module. So many experts
    are `fetched` from the Hub when they are first needed.
    """
    experts = checkpoint.num_experts
    layers = {stack: len(blocks) for stack, blocks in checkpoint.sparse_blocks.items()}
    # An encoder layer is visited once, and needs each of its experts once.
    once = expected_distinct(experts, batch_size * input_tokens)
    whole = expected_distinct(experts, batch_size * output_tokens)
    each_step = expected_distinct(experts, batch_size)
    # Decoder layers are visited in turn: an expert is found again only if the level holds all that a whole generation
    # uses of the layers that ask it. A GPU that does so asks CPU memory for each expert once, and then no more; one
    # that does not asks for all of them in every step. So what is on a GPU for good takes no room in CPU memory, and
    # the slots of both are never added up.
    settled = [gpu for gpu in gpu_levels if gpu.decoder_layers * whole <= gpu.slots]
    settled_layers = sum(gpu.decoder_layers for gpu in settled)
    other_layers = layers["decoder"] - settled_layers
    fits = other_layers * whole <= expert_slots
    decoder = settled_layers * whole + other_layers * (whole if fits else output_tokens * each_step)
    gpu_loads = sum(
        gpu.encoder_layers * once + gpu.decoder_layers * (whole if gpu in settled else output_tokens * each_step)
        for gpu in gpu_levels
    )
    encoder = layers["encoder"] * once
    from_disk = max(0.0, encoder + decoder - fetched)
    load_bytes = round(from_disk * (checkpoint.mean_expert_bytes if expert_bytes is None else expert_bytes))
    dense = sum(
        size * (1 if module.startswith("encoder") else output_tokens) for module, size in dense_disk_bytes.items()
    )
    return Estimate(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        encoder_expert_loads=round(encoder),
        decoder_expert_loads=round(decoder),
        load_bytes=load_bytes,
        dense_disk_bytes=dense,
        gpu_expert_loads=round(gpu_loads),
        gpu_load_bytes=round(gpu_loads * kept_bytes) + (dense if gpu_levels else 0),
        bandwidth_bytes_per_second=bandwidth.bytes_per_second,
        bandwidth_source=bandwidth.source,
        read_seconds=(load_bytes + dense) / bandwidth.bytes_per_second,
    )


def expected_distinct(num_experts: int, tokens: int) -> float:
    """Return how many different experts some tokens choose, on average, if every expert is as likely as another."""
    return num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** tokens)


def hub_cost(
    checkpoint: SwitchCheckpoint, hub: HubState, batch_size: int, input_tokens: int, output_tokens: int
) -> HubCost:
    """Estimate what a fill of one batch brings from the Hub: each expert that it uses and that is not kept, once."""
    total = len(checkpoint.experts)
    kept_share = min(1.0, hub.kept_experts / total)
    fetched = _used_experts(checkpoint, batch_size, input_tokens, output_tokens) * (1 - kept_share)
    dense = 0 if hub.kept_dense_bytes else sum(tensor.stored_bytes for tensor in checkpoint.dense.values())
    expert_bytes = round(fetched * checkpoint.mean_expert_bytes)
    more = round(fetched * hub.file_bytes)
    if hub.limit_bytes is not None:
        more = min(more, max(0, hub.limit_bytes - hub.kept_bytes))
    if hub.download_bytes:
        dense = min(dense, hub.download_bytes)
        fetched, expert_bytes, more = total, hub.download_bytes - dense, hub.download_bytes - dense
    return HubCost(
        downloads=hub.download_bytes > 0,
        output_tokens=output_tokens,
        index_bytes=hub.index_bytes,
        dense_bytes=dense,
        expert_loads=round(fetched),
        expert_bytes=expert_bytes,
        kept_share=kept_share,
        kept_bytes=hub.kept_bytes + hub.kept_dense_bytes,
        folder=hub.folder,
        disk_bytes=dense + more,
        free_bytes=hub.free_bytes,
        bandwidth_bytes_per_second=hub.network.bytes_per_second,
        bandwidth_source=hub.network.source,
        seconds=(dense + expert_bytes) / hub.network.bytes_per_second,
    )


def _used_experts(checkpoint: SwitchCheckpoint, batch_size: int, input_tokens: int, output_tokens: int) -> float:
    """Return how many different experts a fill of one batch is expected to use, all layers together."""
    tokens = {"encoder": batch_size * input_tokens, "decoder": batch_size * output_tokens}
    return sum(
        len(blocks) * expected_distinct(checkpoint.num_experts, tokens[stack])
        for stack, blocks in checkpoint.sparse_blocks.items()
    )


def fit_to_runtime(plan: Plan, checkpoint: SwitchCheckpoint, rss_bytes: int, own_bytes: int = 0) -> Plan:
    """Give up rows and slots where the process is already larger than the plan reserved for it.

    `rss_bytes` is its resident set, the libraries loaded and no weight yet; `own_bytes` is what the caller held before.

    Raises:
        BudgetError: Not a single slot would be left.
    """
    use = plan.tier("cpu")
    surplus = rss_bytes - memory.opened_bytes(checkpoint, plan.precision)
    spare = (use.budget_bytes or 0) - use.total_bytes
    if surplus <= spare:
        return plan
    # Rows that are reserved beyond the first give way before slots do.
    rows = min(surplus - spare, use.activation_bytes - memory.least_activation_bytes(checkpoint, plan))
    use, spare = replace(use, activation_bytes=use.activation_bytes - rows), spare + rows
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
    return plan.with_use(replace(use.with_slots(slots), overhead_bytes=use.overhead_bytes + surplus))
