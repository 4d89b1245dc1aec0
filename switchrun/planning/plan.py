"""The values that a plan is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from switchrun.checkpoint.types import Stack
from switchrun.dtypes import Precision
from switchrun.units import format_bytes

SCHEMA_VERSION = 1

#: A sparse layer: its stack and its block.
SparseLayer = tuple[Stack, int]

BandwidthSource = Literal["given", "measured", "assumed"]

#: Most inputs to run together; `auto` is as many as memory has room for.
BatchSize = int | Literal["auto"]


def sure_rows(batch_size: BatchSize) -> int:
    """Return for how many rows of the longest input memory is reserved, whatever the budget."""
    return 1 if batch_size == "auto" else batch_size


class Tier(str):
    """Where weights may be: `gpu:0` and so on, `cpu`, `disk` or `hub`."""

    __slots__ = ()

    @property
    def gpu(self) -> int | None:
        """The GPU's number; None for the others."""
        return int(self.removeprefix("gpu:")) if self.startswith("gpu:") else None

    @property
    def for_accelerate(self) -> int | str:
        """The tier as accelerate's device maps have it: a GPU is its number."""
        return str(self) if self.gpu is None else self.gpu


CPU = Tier("cpu")
DISK = Tier("disk")
#: No dense weight is placed here, and no expert computed on: it is where both come from, the first time.
HUB = Tier("hub")


def gpu_tier(number: int) -> Tier:
    """Return the tier of a GPU."""
    return Tier(f"gpu:{number}")


def main_tier(tiers: Iterable[Tier]) -> Tier:
    """Return the tier that computes with weights that stay on disk: the first GPU among the tiers, else the CPU."""
    return min((tier for tier in tiers if tier.gpu is not None), key=lambda tier: tier.gpu or 0, default=CPU)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one group of dense weights goes, and why."""

    module: str
    tier: Tier
    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class TierUse:
    """What one tier holds, in bytes.

    Attributes:
        budget_bytes: What the user allows there; None for the disk and the Hub.
        dense_bytes: Dense weights as they are kept there: in memory in the compute dtype, in int8 if experts are packed
            and they are linear layers, in float32 if they are routers'; on disk as stored; on the Hub, those that are
            still to be fetched.
        expert_slots: Fixed buffers for one expert each. Those of a GPU are a level in front of those of the CPU: an
            expert may be in both.
        slot_bytes: Size of one slot; on a GPU, with what torch leaves unused around it.
        expert_bytes: All slots together; on disk, every expert of the checkpoint as stored, or if it is on the Hub
            those that are kept; on the Hub, the others.
        activation_bytes: Reserved for hidden states, attention, caches and scratch of one batch: the plan's batch size,
            or for `auto` one row and a share of what is left.
        overhead_bytes: Reserved for the interpreter, libraries, the index and buffers; on a GPU, for libraries and for
            dense weights on their way.
        total_bytes: The sum; never above the budget.
    """

    tier: Tier
    budget_bytes: int | None
    dense_bytes: int = 0
    expert_slots: int = 0
    slot_bytes: int = 0
    expert_bytes: int = 0
    activation_bytes: int = 0
    overhead_bytes: int = 0
    total_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        total = self.dense_bytes + self.expert_bytes + self.activation_bytes + self.overhead_bytes
        object.__setattr__(self, "total_bytes", total)

    def with_slots(self, count: int) -> TierUse:
        """Return the same with another number of slots."""
        return replace(self, expert_slots=count, expert_bytes=count * self.slot_bytes)


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """A disk's or a network's bandwidth, and where the figure is from."""

    bytes_per_second: float
    source: BandwidthSource


#: Taken where nothing was given or measured: a slow SATA SSD reads 0.5 GB/s, a good NVMe drive 7.
ASSUMED_BANDWIDTH = Bandwidth(1e9, "assumed")
#: The same of the network: 100 Mbit/s.
ASSUMED_NETWORK = Bandwidth(12.5e6, "assumed")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a fill of one batch is expected to cost, if tokens are routed evenly to the experts.

    Attributes:
        input_tokens: Tokens of each input; `output_tokens` are generated for each.
        encoder_expert_loads: Experts read in the encoder step; `decoder_expert_loads` in all decoder steps.
        load_bytes: Bytes of those experts on disk, in the checkpoint or in the offload folder; without those that come
            from the Hub, which are brought from there to memory.
        dense_disk_bytes: Bytes of dense weights that are read again, since they stay on disk.
        gpu_expert_loads: Experts copied from CPU memory to GPUs.
        gpu_load_bytes: Bytes of those experts as they are kept, and of dense weights on disk with which a GPU computes.
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


@dataclass(frozen=True, slots=True)
class HubState:
    """What planning must know of a model that is read from the Hub, beside its headers.

    Attributes:
        folder: Where what was fetched is kept, of which `free_bytes` are free.
        kept_experts: How many experts are there, with `kept_bytes`.
        kept_dense_bytes: What the dense weights take there; 0 if they are still to be fetched.
        file_bytes: What keeping one more expert takes; `limit_bytes` is what all may take, None as much as they need.
        download_bytes: What is downloaded before anything is read, since that is the way to open it; 0 if it is not.
        network: How fast the Hub is.
        index_bytes: Headers that were fetched to make the plan.
    """

    folder: str
    free_bytes: int
    kept_experts: int = 0
    kept_bytes: int = 0
    kept_dense_bytes: int = 0
    file_bytes: int = 0
    limit_bytes: int | None = None
    download_bytes: int = 0
    network: Bandwidth = ASSUMED_NETWORK
    index_bytes: int = 0


@dataclass(frozen=True, slots=True)
class HubCost:
    """What a fill of one batch is expected to bring from the Hub, if tokens are routed evenly to the experts.

    Attributes:
        downloads: Whether all of the model is to be downloaded, before anything is read.
        output_tokens: Tokens that are expected to be generated for each input.
        index_bytes: Headers that were fetched to make the plan; 0 where they were known.
        dense_bytes: Dense weights that are still to be fetched, once for ever.
        expert_loads: Experts that are fetched, each once; `expert_bytes` is what they take as stored. All of them, if
            the model is to be downloaded.
        kept_share: The share of the model's experts that is kept in `folder`; `kept_bytes` is what is kept there, dense
            weights too.
        disk_bytes: What keeping what is fetched will take there; `free_bytes` is what is free.
        seconds: `fetch_bytes` ÷ bandwidth. Computing is mostly hidden behind it.
    """

    downloads: bool
    output_tokens: int
    index_bytes: int
    dense_bytes: int
    expert_loads: int
    expert_bytes: int
    kept_share: float
    kept_bytes: int
    folder: str
    disk_bytes: int
    free_bytes: int
    bandwidth_bytes_per_second: float
    bandwidth_source: BandwidthSource
    seconds: float

    @property
    def fetch_bytes(self) -> int:
        """Bytes still to come from the network."""
        return self.dense_bytes + self.expert_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole plan for one model under given budgets.

    Attributes:
        model_id: What the user called the model.
        revision: The Hub's commit, if it came from there.
        stored_dtype: The checkpoint's own, as safetensors names it.
        repairs: What was repaired in the checkpoint's configuration or names.
        num_experts: Experts of the whole model.
        expert_bytes: One expert as stored; `total_bytes` is all weights.
        device_map: Module → tier, for the dense weights.
        placements: The same with bytes and reasons.
        notes: Which GPUs are not used although there is a budget for them, or why none is by default, a sentence each.
        tiers: What each tier holds, fast to slow; the last is the disk, or the Hub if weights are read from there.
        minimum_cpu_bytes: The smallest `--cpu-memory` that works for this model, dtype and batch.
        resident_cpu_bytes: The `--cpu-memory` from which on every weight stays in memory.
        estimate: What a fill is expected to cost; of one input if the batch size is `auto`.
        hub: What it is expected to bring from the Hub, or what a download takes; None if the weights are in local
            files.
    """

    model_id: str
    revision: str | None
    path: str
    precision: Precision
    stored_dtype: str
    repairs: tuple[str, ...]
    num_experts: int
    expert_bytes: int
    total_bytes: int
    batch_size: BatchSize
    num_beams: int
    device_map: Mapping[str, Tier]
    placements: tuple[Placement, ...]
    notes: tuple[str, ...]
    tiers: tuple[TierUse, ...]
    minimum_cpu_bytes: int
    resident_cpu_bytes: int
    estimate: Estimate
    hub: HubCost | None = None

    def __repr__(self) -> str:
        tiers = ", ".join(f"{use.tier} {format_bytes(use.total_bytes)}" for use in self.tiers)
        return f"<Plan of {self.model_id}, {self.dtype}: {tiers}>"

    @property
    def dtype(self) -> str:
        """What experts are kept in: the compute dtype, `int8` or `nf4`."""
        return self.precision.name

    @property
    def sure_rows(self) -> int:
        """Those of the batch size: see the function."""
        return sure_rows(self.batch_size)

    @property
    def gpus(self) -> tuple[int, ...]:
        """The numbers of the GPUs that have dense weights; the first also computes with those that stay on disk."""
        return tuple(use.tier.gpu for use in self.tiers if use.tier.gpu is not None and use.dense_bytes)

    def tier(self, name: str) -> TierUse:
        """Return what the tier of that name (`cpu`) holds."""
        return next(use for use in self.tiers if use.tier == name)

    def with_use(self, use: TierUse) -> Plan:
        """Return the plan with another use of one tier."""
        return replace(self, tiers=tuple(use if each.tier == use.tier else each for each in self.tiers))

    def as_record(self) -> dict[str, Any]:
        """Return the plan as a JSON-ready dict (`docs/schemas/plan.schema.json`), the map in accelerate's format."""
        record: dict[str, Any] = {"schema_version": SCHEMA_VERSION}
        for name, value in asdict(self).items():
            if name == "precision":
                record |= {"dtype": self.dtype, "compute_dtype": self.precision.compute.value}
            else:
                record[name] = value
        record["device_map"] = {module: tier.for_accelerate for module, tier in self.device_map.items()}
        return record
