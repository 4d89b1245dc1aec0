"""What a fill will cost: expected expert loads, bytes and seconds of reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.planning.types import BandwidthSource, Estimate

#: Taken where nothing was given or measured: a slow SATA SSD reads 0.5 GB/s, a good NVMe drive 7.
ASSUMED_BANDWIDTH = 1e9


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """A disk's read bandwidth, and where the figure is from."""

    bytes_per_second: float
    source: BandwidthSource


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
    bandwidth: Bandwidth | None = None,
    expert_bytes: float | None = None,
) -> Estimate:
    """Estimate the first fill of a session, with nothing in the cache yet.

    Args:
        checkpoint: The checkpoint.
        batch_size: Inputs in the batch.
        input_tokens: Tokens of each input.
        output_tokens: Tokens generated for each.
        expert_slots: Experts that memory holds.
        dense_disk_bytes: Module → bytes of the dense weights that stay on disk.
        bandwidth: Read bandwidth of the disk; None assumes one.
        expert_bytes: What is read for an expert on average; as it is stored if None.
    """
    experts = checkpoint.num_experts
    encoder_layers = len(checkpoint.sparse_blocks["encoder"])
    decoder_layers = len(checkpoint.sparse_blocks["decoder"])
    encoder = encoder_layers * expected_distinct(experts, batch_size * input_tokens)
    # Layers are visited in turn: an expert is found again only if memory holds all that a whole generation uses.
    distinct = decoder_layers * expected_distinct(experts, batch_size * output_tokens)
    each_step = decoder_layers * expected_distinct(experts, batch_size)
    decoder = distinct if distinct <= expert_slots else output_tokens * each_step
    each = checkpoint.expert_bytes if expert_bytes is None else expert_bytes
    load_bytes = round((encoder + decoder) * each)
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
        bandwidth_bytes_per_second=speed.bytes_per_second,
        bandwidth_source=speed.source,
        read_seconds=(load_bytes + dense) / speed.bytes_per_second,
    )
