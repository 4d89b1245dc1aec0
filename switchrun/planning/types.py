"""The values that a plan is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from switchrun.dtypes import Dtype, PackedDtype, Precision

SCHEMA_VERSION = 1

#: Where weights may be, as accelerate writes it in a device map: a GPU's number, `cpu` or `disk`.
Tier = int | str

BandwidthSource = Literal["given", "measured", "assumed"]


def tier_name(tier: Tier) -> str:
    """Write a tier as users read it: `gpu:0`, `cpu`, `disk`."""
    return f"gpu:{tier}" if isinstance(tier, int) else tier


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one group of dense weights goes, and why."""

    module: str
    tier: str
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class TierUse:
    """What one tier holds, in bytes.

    Attributes:
        tier: `gpu:0`, `cpu` or `disk`.
        budget_bytes: What the user allows there; None for the disk.
        dense_bytes: Dense weights as they are kept there: in memory in the compute dtype, in int8 if experts are packed
            and they are linear layers, in float32 if they are routers'; on disk as stored.
        expert_slots: Fixed buffers, each of which holds one expert. Those of a GPU are a level in front of those of the
            CPU: an expert may be in both.
        slot_bytes: Size of one slot; on a GPU, with what torch leaves unused around it.
        expert_bytes: All slots together; on disk, every expert of the checkpoint as stored.
        activation_bytes: Reserved for hidden states, attention, caches and scratch of one batch.
        overhead_bytes: Reserved for the interpreter, libraries, the index and buffers; on a GPU, for libraries and for
            dense weights on their way.
        total_bytes: The sum; never above the budget.
    """

    tier: str
    budget_bytes: int | None
    dense_bytes: int
    expert_slots: int
    slot_bytes: int
    expert_bytes: int
    activation_bytes: int
    overhead_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a fill of one batch is expected to cost, if tokens are routed evenly to the experts.

    Attributes:
        input_tokens: Tokens of each input.
        output_tokens: Tokens generated for each input.
        encoder_expert_loads: Experts read in the encoder step.
        decoder_expert_loads: Experts read in all decoder steps.
        load_bytes: Bytes of those experts, where they lie now: in the checkpoint or, packed, in the offload folder.
        dense_disk_bytes: Bytes of dense weights that are read again, since they stay on disk.
        gpu_expert_loads: Experts copied from CPU memory to GPUs.
        gpu_load_bytes: Bytes of those experts as they are kept, and of dense weights on disk with which a GPU computes.
        bandwidth_bytes_per_second: Read bandwidth of the disk.
        bandwidth_source: Where that figure is from.
        read_seconds: Bytes ÷ bandwidth. Computing comes on top, mostly hidden behind the reads.
    """

    input_tokens: int
    output_tokens: int
    encoder_expert_loads: int
    decoder_expert_loads: int
    load_bytes: int
    dense_disk_bytes: int
    gpu_expert_loads: int
    gpu_load_bytes: int
    bandwidth_bytes_per_second: float
    bandwidth_source: BandwidthSource
    read_seconds: float

    @property
    def expert_loads(self) -> int:
        """Experts read in all."""
        return self.encoder_expert_loads + self.decoder_expert_loads


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole plan for one model under given budgets.

    Attributes:
        model_id: What the user called the model.
        revision: The Hub's commit, if it came from there.
        path: The checkpoint's folder.
        dtype: What experts are kept in: the compute dtype, `int8` or `nf4`.
        compute_dtype: What everything is computed in, and what is not packed kept in.
        stored_dtype: The checkpoint's own, as safetensors names it.
        repairs: What was mended in the checkpoint's configuration or names.
        num_experts: Experts of the whole model.
        expert_bytes: Bytes of one expert as stored.
        total_bytes: Bytes of all weights as stored.
        batch_size: Inputs that run together.
        num_beams: Beams of each input.
        device_map: Module → tier in accelerate's format, for the dense weights.
        placements: The same with bytes and reasons.
        notes: Which GPUs are not used although there is a budget for them, or why none is by default, a sentence each.
        tiers: What each tier holds, fast to slow; the last is the disk.
        minimum_cpu_bytes: The smallest `--cpu-memory` that works for this model, dtype and batch.
        resident_cpu_bytes: The `--cpu-memory` from which on every weight stays in memory.
        estimate: What a fill is expected to cost.
    """

    model_id: str
    revision: str | None
    path: str
    dtype: str
    compute_dtype: str
    stored_dtype: str
    repairs: tuple[str, ...]
    num_experts: int
    expert_bytes: int
    total_bytes: int
    batch_size: int
    num_beams: int
    device_map: Mapping[str, Tier]
    placements: tuple[Placement, ...]
    notes: tuple[str, ...]
    tiers: tuple[TierUse, ...]
    minimum_cpu_bytes: int
    resident_cpu_bytes: int
    estimate: Estimate

    @property
    def precision(self) -> Precision:
        """Both dtypes as one value."""
        packed = None if self.dtype == self.compute_dtype else PackedDtype(self.dtype)
        return Precision(Dtype(self.compute_dtype), packed)

    @property
    def gpus(self) -> tuple[int, ...]:
        """The numbers of the GPUs that have dense weights; the first also computes with those that stay on disk."""
        return tuple(int(use.tier.removeprefix("gpu:")) for use in self.tiers[:-2] if use.dense_bytes)

    def tier(self, name: str) -> TierUse:
        """Give what the tier of that name (`cpu`) holds."""
        return next(use for use in self.tiers if use.tier == name)

    def as_record(self) -> dict[str, Any]:
        """Give the plan as a JSON-ready dict (`docs/schemas/plan.schema.json`)."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}
