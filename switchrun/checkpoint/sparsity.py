"""Which blocks have experts, and how a configuration says so to transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from switchrun.checkpoint.types import Stack


def configured_step(config: Mapping[str, Any], stack: Stack, num_layers: int) -> int:
    """The step that transformers would take: the configuration's own key, or else what it computes.

    Source: SwitchTransformersConfig.__post_init__, where unknown keys override what has been computed. Its edges are
    kept: no sparse layers gives a step of `num_layers`, more sparse layers than layers gives 0.
    """
    own = config.get(f"{stack}_sparse_step")
    if type(own) is int and own >= 0:
        return own
    num_sparse: int = config[f"num_sparse_{stack}_layers"]
    return num_layers // num_sparse if num_sparse > 0 else num_layers


def sparse_blocks(num_layers: int, step: int) -> tuple[int, ...]:
    """The blocks that transformers builds with experts (SwitchTransformersStack.__init__)."""
    if step == 0:
        return ()
    return tuple(i for i in range(num_layers) if step == 1 or i % step == 1)


def find_step(num_layers: int, blocks: tuple[int, ...], own: int) -> int | None:
    """Find the step that makes transformers build just these blocks with experts.

    Args:
        num_layers: Blocks of the stack.
        blocks: The numbers of those with experts, ascending.
        own: The step by the configuration as it is; kept if it will do.

    Returns:
        The step, or None if transformers cannot build this pattern.
    """
    if not blocks:
        guess = 0
    elif blocks[0] == 0:
        guess = 1
    else:
        guess = blocks[1] - blocks[0] if len(blocks) > 1 else num_layers
    return next((step for step in (own, guess) if sparse_blocks(num_layers, step) == blocks), None)
