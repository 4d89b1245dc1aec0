"""What a fill will cost: expected expert loads, bytes and seconds of reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.planning.device_map import SparseLayer
from switchrun.planning.plan import BandwidthSource, Estimate, Tier, TierUse

#: Taken where nothing was given or measured: a slow SATA SSD reads 0.5 GB/s, a good NVMe drive 7.
ASSUMED_BANDWIDTH = 1e9


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """A disk's read bandwidth, and where the figure is from."""

    bytes_per_second: float
    source: BandwidthSource


@dataclass(frozen=True, slots=True)
class GpuLevel:
    """A GPU's part of the cache.

    Attributes:
        slots: Experts that it holds.
        encoder_layers: Sparse layers of the encoder that compute there.
        decoder_layers: The same of the decoder.
    """

    slots: int
    encoder_layers: int
    decoder_layers: int

    @classmethod
    def of(cls, use: TierUse, computing: Mapping[SparseLayer, Tier]) -> GpuLevel:
        """Give it for what a plan's tier holds, and the tier on which each sparse layer computes."""
        stacks = [stack for (stack, _), tier in computing.items() if tier == use.tier]
        return cls(use.expert_slots, stacks.count("encoder"), stacks.count("decoder"))


def expected_distinct(num_experts: int, tokens: int) -> float:
    """Give how many different experts some tokens choose, on average, if every expert is as likely as another."""
    return num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** tokens)


def estimate_fill(
    checkpoint: SwitchCheckpoint,
    *,
    batch_size: int,
    input_tokens: int,
    output_tokens: int,
    expert_slots: int,
    dense_disk_bytes: Mapping[str, int],
    gpu_levels: Sequence[GpuLevel] = (),
    bandwidth: Bandwidth | None = None,
    expert_bytes: float | None = None,
    kept_bytes: int = 0,
) -> Estimate:
    """Estimate the first fill of a session, with nothing in the cache yet.

    Args:
        checkpoint: The checkpoint.
        batch_size: Inputs in the batch.
        input_tokens: Tokens of each input.
        output_tokens: Tokens generated for each.
        expert_slots: Experts that CPU memory holds.
        dense_disk_bytes: Module → bytes of the dense weights that stay on disk.
        gpu_levels: What GPUs hold in front of it.
        bandwidth: Read bandwidth of the disk; None assumes one.
        expert_bytes: What is read for an expert on average; as it is stored if None.
        kept_bytes: What an expert takes as it is kept in memory: what is copied to a GPU.
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
    load_bytes = round((encoder + decoder) * (checkpoint.expert_bytes if expert_bytes is None else expert_bytes))
    dense = sum(
        size * (1 if module.startswith("encoder") else output_tokens) for module, size in dense_disk_bytes.items()
    )
    speed = bandwidth or Bandwidth(ASSUMED_BANDWIDTH, "assumed")
    return Estimate(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        encoder_expert_loads=round(encoder),
        decoder_expert_loads=round(decoder),
        load_bytes=load_bytes,
        dense_disk_bytes=dense,
        gpu_expert_loads=round(gpu_loads),
        gpu_load_bytes=round(gpu_loads * kept_bytes) + (dense if gpu_levels else 0),
        bandwidth_bytes_per_second=speed.bytes_per_second,
        bandwidth_source=speed.source,
        read_seconds=(load_bytes + dense) / speed.bytes_per_second,
    )
