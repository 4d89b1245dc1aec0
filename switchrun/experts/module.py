"""The module that stands where transformers has a sparse layer's experts, and asks the cache for the chosen ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import torch
from torch import nn

from switchrun.checkpoint.types import ExpertKey, Stack
from switchrun.experts.levels import ExpertLevels
from switchrun.experts.packed import multiply
from switchrun.experts.slots import ExpertWeights


class RoutingContext:
    """What a sparse layer must know of the batch beyond its hidden states.

    Attributes:
        live: Boolean `[rows, tokens]`: tokens that count. Padding and finished sequences do not: they cannot change
            a real token, so no expert is read for them. None: all count.
        dropped: Integer `[rows]`: live tokens over their expert's capacity so far, summed over the layers.
        on_layer: Called after each sparse layer.
    """

    def __init__(self) -> None:
        self.live: torch.Tensor | None = None
        self.dropped: torch.Tensor | None = None
        self.on_layer: Callable[[], None] | None = None


class OffloadedExperts(nn.Module):
    """The experts of one sparse layer; holds no weights.

    Takes the place of `SwitchTransformersExperts` (transformers 5.21 and later) and computes the same: for every
    token the output of its expert times the router's probability, zero for dropped tokens.

    Args:
        levels: Where experts come from: from the level of the device on which the hidden states are.
        stack: `encoder` or `decoder`.
        block: The block's number.
        activation: The function between the two matrices.
        context: Shared by all sparse layers of a session.
    """

    def __init__(
        self,
        levels: ExpertLevels,
        stack: Stack,
        block: int,
        activation: Callable[[torch.Tensor], torch.Tensor],
        context: RoutingContext,
    ) -> None:
        super().__init__()
        self.levels = levels
        self._stack: Stack = stack
        self._block = block
        self._activation = activation
        self._context = context

    def forward(
        self, hidden_states: torch.Tensor, selected_experts: torch.Tensor, routing_weights: torch.Tensor
    ) -> torch.Tensor:
        """Run the chosen experts; blocks while they are read.

        Args:
            hidden_states: `[rows × tokens, d_model]`.
            selected_experts: One-hot `[rows × tokens, 1, num_experts]`, all zero for a dropped token.
            routing_weights: `[rows × tokens, 1]`.

        Returns:
            `[rows × tokens, d_model]`.

        Raises:
            CorruptCheckpointError: An expert cannot be read.
        """
        kept, chosen = selected_experts.squeeze(1).max(dim=-1)
        active = self._live_only(kept.bool())
        # Small index arithmetic on the CPU: the cache needs plain numbers anyway.
        positions = active.nonzero().squeeze(1).cpu()
        output = torch.zeros_like(hidden_states)
        routing_weights = routing_weights.to(hidden_states.device)
        self.compute(hidden_states, positions, chosen.cpu()[positions], routing_weights, output)
        if self._context.on_layer is not None:
            self._context.on_layer()
        return output

    def compute(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        chosen: torch.Tensor,
        routing_weights: torch.Tensor,
        output: torch.Tensor,
        most_rows: int | None = None,
    ) -> None:
        """Run each expert once over all tokens that chose it; blocks while experts are read.

        Args:
            hidden_states: `[tokens, d_model]`.
            positions: `[active]`, on the CPU: the tokens that have an expert.
            chosen: `[active]`, on the CPU: which one.
            routing_weights: `[tokens, 1]`.
            output: `[tokens, d_model]`, written at the positions; may be `hidden_states` itself.
            most_rows: Tokens to run an expert with at a time, if scratch memory must be bounded.

        Raises:
            CorruptCheckpointError: An expert cannot be read.
        """
        keys = [ExpertKey(self._stack, self._block, expert) for expert in sorted(set(chosen.tolist()))]
        of_expert = [positions[chosen == key.expert] for key in keys]
        if not keys:
            return
        # Brought to the device together: each transfer waits for all that is being computed there.
        together = torch.cat(of_expert).to(hidden_states.device)
        parts = torch.split(together, [len(tokens) for tokens in of_expert])
        tokens_of = dict(zip(keys, parts, strict=True))
        # Closed at once if anything fails or Ctrl-C comes: else reads would still be under way at the next call.
        with closing(self.levels.on(hidden_states.device).stream(keys)) as stream:
            for key, weights in stream:
                tokens = tokens_of[key]
                step = most_rows or len(tokens)
                for start in range(0, len(tokens), step):
                    rows = tokens[start : start + step]
                    expert_output = self._run(weights, hidden_states[rows]) * routing_weights[rows]
                    output.index_copy_(0, rows, expert_output.to(output.dtype))

    def _run(self, weights: ExpertWeights, tokens: torch.Tensor) -> torch.Tensor:
        return multiply(self._activation(multiply(tokens, weights.wi)), weights.wo)

    def _live_only(self, kept: torch.Tensor) -> torch.Tensor:
        """Mask out tokens that do not count; note those that count and were dropped."""
        live = self._context.live
        if live is None:
            return kept
        live = live.to(kept.device)
        if self._context.dropped is not None:
            dropped = (live & ~kept.view(live.shape)).sum(dim=-1)
            self._context.dropped += dropped.to(self._context.dropped.device)
        return kept & live.flatten()
