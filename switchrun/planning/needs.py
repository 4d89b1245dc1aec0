"""What a model needs in memory, part by part, whatever the budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.dtypes import Precision
from switchrun.planning import memory
from switchrun.planning.device_map import SparseLayer


@dataclass(frozen=True)
class Needs:
    """Bytes that a model needs in memory.

    Attributes:
        overhead: The process without weights.
        activations: One batch, on each device that computes.
        slot: A slot in CPU memory.
        gpu_slot: A slot on a GPU.
        num_experts: Experts of the whole model.
        sparse_layers: The layers that have them, in the model's order.
        groups: Dense weights by module, in the order in which they deserve fast memory.
        largest_tensor: The largest of them.
    """

    overhead: int
    activations: int
    slot: int
    gpu_slot: int
    num_experts: int
    sparse_layers: Sequence[SparseLayer]
    groups: Mapping[str, int]
    largest_tensor: int

    @property
    def sparse_modules(self) -> set[str]:
        """The modules of `groups` with a sparse layer."""
        return {f"{stack}.block.{block}" for stack, block in self.sparse_layers}

    @property
    def experts_per_layer(self) -> int:
        """Experts of one sparse layer."""
        return self.num_experts // len(self.sparse_layers)

    @property
    def fixed(self) -> int:
        """What CPU memory takes before any weight."""
        return self.overhead + self.activations

    @property
    def minimum(self) -> int:
        """All dense weights on disk, brought in one module at a time, and a single slot."""
        return self.fixed + self.largest_tensor + self.slot

    @property
    def resident(self) -> int:
        """Every weight in CPU memory."""
        return self.fixed + sum(self.groups.values()) + self.num_experts * self.slot

    @property
    def gpu_fixed(self) -> int:
        """What a GPU that computes takes before any weight."""
        return memory.GPU_LIBRARY_BYTES + self.activations

    @property
    def gpu_slots(self) -> int:
        """What is set aside on a GPU for slots, before dense weights get memory."""
        return min(memory.GPU_RESERVED_SLOTS, self.num_experts) * self.gpu_slot

    @property
    def gpu_minimum(self) -> int:
        """What a GPU takes that computes the first sparse layer, in the order of `groups`."""
        sparse, dense = self.sparse_modules, 0
        for module, size in self.groups.items():
            dense += size
            if module in sparse:
                break
        return self.gpu_fixed + self.gpu_slots + dense + self.largest_tensor


def needs_of(
    checkpoint: SwitchCheckpoint, precision: Precision, batch_size: int, num_beams: int, output_tokens: int
) -> Needs:
    """Add up what a checkpoint needs for batches of a size."""
    tokens = memory.max_input_tokens(checkpoint)
    shape = memory.BatchShape(batch_size, tokens, memory.max_output_tokens(checkpoint, output_tokens))
    sizes = {name: memory.dense_bytes(name, tensor, precision) for name, tensor in checkpoint.dense.items()}
    groups: dict[str, int] = {}
    for name in sorted(sizes, key=_importance):
        groups[module_of(name)] = groups.get(module_of(name), 0) + sizes[name]
    return Needs(
        overhead=memory.overhead_bytes(checkpoint, precision),
        activations=memory.activation_bytes(checkpoint, precision, shape, num_beams),
        slot=memory.slot_bytes(checkpoint, precision),
        gpu_slot=memory.gpu_slot_bytes(checkpoint, precision),
        num_experts=len(checkpoint.experts),
        sparse_layers=[(stack, block) for stack, blocks in checkpoint.sparse_blocks.items() for block in blocks],
        groups=groups,
        largest_tensor=max(sizes.values()),
    )


def module_of(name: str) -> str:
    """Give the module that a dense tensor is placed with: a whole block, a final norm, `shared` or `lm_head`."""
    parts = name.split(".")
    return ".".join(parts[:3] if parts[1] == "block" else parts[:-1])


def _importance(name: str) -> tuple[int, int]:
    """Order dense tensors by how often their bytes are needed: each token's first, then block by block."""
    parts = name.split(".")
    block = int(parts[2]) if parts[1] == "block" else 0
    return (0 if parts[0] in ("shared", "lm_head") else 1 if parts[0] == "decoder" else 2, block)
