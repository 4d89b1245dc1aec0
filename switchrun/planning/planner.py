"""The planner: budgets and a checkpoint's headers in, a plan out; pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from switchrun.checkpoint.types import SwitchCheckpoint, TensorSlice
from switchrun.dtypes import Precision, resolve_dtype
from switchrun.errors import BudgetError
from switchrun.planning import memory
from switchrun.planning.budgets import Budgets
from switchrun.planning.device_map import check_device_map, tier_of
from switchrun.planning.estimate import Bandwidth, estimate_fill
from switchrun.planning.types import Placement, Plan, Tier, TierUse, tier_name
from switchrun.units import format_bytes

_EVERY_TOKEN = "used for every generated token"
_ONCE = "used once for each batch"
_SHARED = "shared.weight"


@dataclass(frozen=True)
class _Needs:
    """Bytes that a model needs in CPU memory, part by part."""

    overhead: int
    activations: int
    slot: int
    num_experts: int
    groups: Mapping[str, int]  # dense weights by module, in the order in which they deserve fast memory
    largest_tensor: int

    @property
    def fixed(self) -> int:
        return self.overhead + self.activations

    @property
    def minimum(self) -> int:
        """All dense weights on disk, brought in one module at a time, and a single slot."""
        return self.fixed + self.largest_tensor + self.slot

    @property
    def resident(self) -> int:
        return self.fixed + sum(self.groups.values()) + self.num_experts * self.slot


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
    what is left is divided into expert slots. Dense weights that find no place stay on disk.

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
        BudgetError: The CPU budget is below the minimum, or the given map does not fit.
        UsageError: The dtype or the device map makes no sense.
    """
    precision = resolve_dtype(dtype, checkpoint.stored_dtype, checkpoint.plain_dtype)
    needs = _needs(checkpoint, precision, batch_size, num_beams, output_tokens)
    if budgets.cpu_bytes < needs.minimum:
        raise BudgetError(
            f"{checkpoint.id} in {precision.name} needs at least {_mib_up(needs.minimum)} of CPU memory, "
            f"{format_bytes(budgets.cpu_bytes)} is allowed",
            f"use --cpu-memory {_mib_up(needs.minimum).replace(' ', '')} or more",
        )
    reason: dict[str, str]
    if device_map is None:
        placed = _place(needs, budgets)
        reason = {module: _why(module, tier) for module, tier in placed.items()}
    else:
        check_device_map(device_map, checkpoint.dense)
        placed = {name: tier_of(name, device_map) for name in checkpoint.dense}
        reason = dict.fromkeys(placed, "by the given device map")
    full_map = _with_aliases(device_map or placed, checkpoint)
    sizes = _sizes(checkpoint, precision, placed)
    # Under another name a map may put the embedding on a second tier: that is a copy, and takes memory.
    for alias in _aliases(checkpoint):
        tier = tier_of(f"{alias}.weight", full_map)
        if tier != tier_of(_SHARED, full_map):
            placed[alias], reason[alias] = tier, "a copy of shared, by the given device map"
            sizes[alias] = _size(_SHARED, checkpoint.dense[_SHARED], precision, tier)
    tiers = _tier_uses(checkpoint, precision, needs, budgets, placed, sizes)
    return Plan(
        model_id=checkpoint.id,
        revision=checkpoint.revision,
        path=str(checkpoint.path),
        dtype=precision.name,
        compute_dtype=precision.compute.value,
        stored_dtype=checkpoint.stored_dtype,
        repairs=checkpoint.repairs,
        num_experts=needs.num_experts,
        expert_bytes=checkpoint.expert_bytes,
        total_bytes=checkpoint.total_bytes,
        batch_size=batch_size,
        num_beams=num_beams,
        device_map=full_map,
        placements=tuple(Placement(m, tier_name(t), sizes[m], reason[m]) for m, t in placed.items()),
        tiers=tiers,
        minimum_cpu_bytes=needs.minimum,
        resident_cpu_bytes=needs.resident,
        estimate=estimate_fill(
            checkpoint,
            batch_size=batch_size,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            expert_slots=sum(use.expert_slots for use in tiers if use.tier != "disk"),
            dense_disk_bytes={m: sizes[m] for m, t in placed.items() if t == "disk"},
            bandwidth=bandwidth,
            expert_bytes=memory.mean_load_bytes(checkpoint, precision, stored_share),
        ),
    )


def module_of(name: str) -> str:
    """Give the module that a dense tensor is placed with: a whole block, a final norm, `shared` or `lm_head`."""
    parts = name.split(".")
    return ".".join(parts[:3] if parts[1] == "block" else parts[:-1])


def _needs(
    checkpoint: SwitchCheckpoint, precision: Precision, batch_size: int, num_beams: int, output_tokens: int
) -> _Needs:
    tokens = memory.max_input_tokens(checkpoint)
    shape = memory.BatchShape(batch_size, tokens, memory.max_output_tokens(checkpoint, output_tokens))
    sizes = {name: memory.dense_bytes(name, tensor, precision) for name, tensor in checkpoint.dense.items()}
    groups: dict[str, int] = {}
    for name in sorted(sizes, key=_importance):
        groups[module_of(name)] = groups.get(module_of(name), 0) + sizes[name]
    return _Needs(
        overhead=memory.overhead_bytes(checkpoint, precision),
        activations=memory.activation_bytes(checkpoint, precision, shape, num_beams),
        slot=memory.slot_bytes(checkpoint, precision),
        num_experts=len(checkpoint.experts),
        groups=groups,
        largest_tensor=max(sizes.values()),
    )


def _importance(name: str) -> tuple[int, int]:
    """Order dense tensors by how often their bytes are needed: each token's first, then block by block."""
    parts = name.split(".")
    block = int(parts[2]) if parts[1] == "block" else 0
    return (0 if parts[0] in ("shared", "lm_head") else 1 if parts[0] == "decoder" else 2, block)


def _place(needs: _Needs, budgets: Budgets) -> dict[str, Tier]:
    """Fill the tiers from fast to slow; once a module did not fit on a tier, no later one goes there."""
    rooms: list[tuple[Tier, int]] = [
        (number, size - needs.activations - needs.slot) for number, size in sorted(budgets.gpu_bytes.items())
    ]
    cpu_room = budgets.cpu_bytes - needs.fixed - min(memory.RESERVED_SLOTS, needs.num_experts) * needs.slot
    if sum(needs.groups.values()) > cpu_room + sum(max(0, room) for _, room in rooms):
        # What stays on disk passes through memory, a tensor at a time.
        cpu_room -= needs.largest_tensor
    rooms.append(("cpu", cpu_room))
    placed: dict[str, Tier] = {}
    for module, size in needs.groups.items():
        while rooms and rooms[0][1] < size:
            rooms.pop(0)
        if rooms:
            rooms[0] = (rooms[0][0], rooms[0][1] - size)
        placed[module] = rooms[0][0] if rooms else "disk"
    return placed


def _why(module: str, tier: Tier) -> str:
    use = _ONCE if module.startswith("encoder") else _EVERY_TOKEN
    return f"{use}; no room in memory" if tier == "disk" else use


def _sizes(checkpoint: SwitchCheckpoint, precision: Precision, placed: Mapping[str, Tier]) -> dict[str, int]:
    """Give the bytes of every placed module or tensor on its tier: on disk as stored, elsewhere as it is kept."""
    sizes = dict.fromkeys(placed, 0)
    for name, tensor in checkpoint.dense.items():
        owner = name if name in sizes else module_of(name)
        sizes[owner] += _size(name, tensor, precision, placed[owner])
    return sizes


def _size(name: str, tensor: TensorSlice, precision: Precision, tier: Tier) -> int:
    return tensor.stored_bytes if tier == "disk" else memory.dense_bytes(name, tensor, precision)


def _tier_uses(
    checkpoint: SwitchCheckpoint,
    precision: Precision,
    needs: _Needs,
    budgets: Budgets,
    placed: Mapping[str, Tier],
    sizes: Mapping[str, int],
) -> tuple[TierUse, ...]:
    on: dict[Tier, int] = dict.fromkeys(sorted(budgets.gpu_bytes), 0)
    for module, tier in placed.items():
        on[tier] = on.get(tier, 0) + sizes[module]
    uses = []
    for number in sorted(tier for tier in on if isinstance(tier, int)):
        # An expert that computes on a GPU passes through one buffer there; slots of its own come with a later version.
        # A GPU that no module goes to is not used at all.
        activations = needs.activations + needs.slot if on[number] else 0
        total = on[number] + activations
        budget = budgets.gpu_bytes.get(number)
        if budget is not None and total > budget:
            raise BudgetError(
                f"the device map needs {format_bytes(total)} on gpu:{number}, {format_bytes(budget)} is allowed"
            )
        uses.append(TierUse(tier_name(number), budget, on[number], 0, needs.slot, 0, activations, 0, total))

    dense = on.get("cpu", 0)
    passing = _largest_on_disk(checkpoint, precision, placed)
    room = budgets.cpu_bytes - needs.fixed - dense - passing
    slots = min(room // needs.slot, needs.num_experts)
    if slots < 1:
        total = needs.fixed + dense + passing + needs.slot
        raise BudgetError(
            f"the device map needs {_mib_up(total)} of CPU memory, {format_bytes(budgets.cpu_bytes)} is allowed"
        )
    overhead = needs.overhead + passing
    total = overhead + needs.activations + dense + slots * needs.slot
    uses.append(
        TierUse(
            "cpu", budgets.cpu_bytes, dense, slots, needs.slot, slots * needs.slot, needs.activations, overhead, total
        )
    )
    expert_bytes = needs.num_experts * checkpoint.expert_bytes
    disk = on.get("disk", 0)
    uses.append(TierUse("disk", None, disk, 0, 0, expert_bytes, 0, 0, disk + expert_bytes))
    return tuple(uses)


def _largest_on_disk(checkpoint: SwitchCheckpoint, precision: Precision, placed: Mapping[str, Tier]) -> int:
    def on_disk(*names: str) -> bool:
        return next(placed[name] for name in names if name in placed) == "disk"

    sizes = [
        memory.dense_bytes(name, tensor, precision)
        for name, tensor in checkpoint.dense.items()
        if on_disk(name, module_of(name))
    ]
    if any(placed.get(alias) == "disk" for alias in _aliases(checkpoint)):
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


def _mib_up(size: int) -> str:
    return f"{-(-size // 1024**2):,} MiB".replace(",", "")
