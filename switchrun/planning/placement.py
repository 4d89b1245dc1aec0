"""The planner's own choice of a tier for each module of dense weights."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from switchrun.planning import memory
from switchrun.planning.budgets import Budgets
from switchrun.planning.device_map import computing_tiers
from switchrun.planning.memory import Needs
from switchrun.planning.plan import CPU, DISK, Tier, gpu_tier
from switchrun.units import format_bytes, mib_up

_EVERY_TOKEN = "used for every generated token"
_ONCE = "used once for each batch"


def place(needs: Needs, budgets: Budgets) -> tuple[dict[str, Tier], tuple[str, ...]]:
    """Fill the tiers from fast to slow with the modules, in the order in which they deserve fast memory.

    A GPU is used only if experts compute there. A GPU that is too small for that, or that no sparse layer is left for,
    is let be, and so are the last ones if those before them hold every weight.

    Returns:
        Module → tier, and a sentence on each GPU that is not used.
    """
    # What a GPU has for weights, slots included.
    rooms = {number: size - needs.gpu_fixed for number, size in sorted(budgets.gpu_bytes.items())}
    notes: dict[int, str] = {}
    while True:
        used = _fewest(needs, rooms)
        placed = _fill(needs, used, budgets.cpu_bytes)
        computing = set(computing_tiers(needs.sparse_layers, placed).values())
        idle = [number for number in used if gpu_tier(number) not in computing]
        if not idle:
            break
        least = min(idle, key=rooms.__getitem__)
        del rooms[least]
        notes[least] = _why_idle(needs, budgets.gpu_bytes[least])
    notes |= {number: "the GPUs before it hold every weight" for number in rooms if number not in used}
    return placed, tuple(f"gpu:{number} is not used: {why}" for number, why in sorted(notes.items()))


def why(module: str, tier: Tier) -> str:
    """Tell why a module was placed on a tier."""
    use = _ONCE if module.startswith("encoder") else _EVERY_TOKEN
    return f"{use}; no room in memory" if tier == DISK else use


def _why_idle(needs: Needs, budget: int) -> str:
    if budget >= needs.gpu_minimum:
        return "no layer with experts is left for it"
    return f"a layer with experts needs {mib_up(needs.gpu_minimum)} there, {format_bytes(budget)} is allowed"


def _fewest(needs: Needs, rooms: Mapping[int, int]) -> dict[int, int]:
    """Give the first GPUs that hold every weight together; all if they do not."""
    everything = sum(needs.groups.values()) + needs.num_experts * needs.gpu_slot
    used: dict[int, int] = {}
    for number, room in rooms.items():
        used[number] = room
        if sum(max(0, each) for each in used.values()) >= everything:
            break
    return used


def _fill(needs: Needs, gpu_rooms: Mapping[int, int], cpu_bytes: int) -> dict[str, Tier]:
    """Fill the tiers, with room set aside for slots, and for what stays on disk, if anything does."""
    gpus = {number: max(0, room - needs.gpu_slots) for number, room in gpu_rooms.items()}
    cpu = cpu_bytes - needs.fixed - min(memory.RESERVED_SLOTS, needs.num_experts) * needs.slot
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
