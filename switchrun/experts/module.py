"""The module that stands where transformers has a sparse layer's experts, and asks the cache for the chosen ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing

import torch
from torch import nn

from switchrun.checkpoint.types import ExpertKey, Stack
from switchrun.experts.tiers import ExpertTiers
from switchrun.kernels.matrices import ExpertWeights, multiply


class RoutingContext:
    """What a sparse layer must know of the batch beyond its hidden states.

    Attributes:
        live: For each row whether its tokens count. Padding and finished sequences do not: they cannot change a real
            token, so no expert is read for them. None: all count.
        dropped: For each row its live tokens over their expert's capacity so far, summed over the layers.
        on_layer: Called after each sparse layer.
    """

    def __init__(self) -> None:
        self.live: list[list[bool]] | None = None
        self.dropped: list[int] | None = None
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
        levels: ExpertTiers,
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
        # Plain numbers: the cache needs them anyway, and a small torch operation costs more than a short loop.
        chosen = {position: expert for position, _, expert in selected_experts.nonzero().tolist()}
        tokens_of: dict[int, list[int]] = {}
        for position in self._live(chosen):
            tokens_of.setdefault(chosen[position], []).append(position)
        output = torch.zeros_like(hidden_states)
        self.compute(hidden_states, tokens_of, routing_weights, output)
        if self._context.on_layer is not None:
            self._context.on_layer()
        return output

    def compute(
        self,
        hidden_states: torch.Tensor,
        tokens_of: Mapping[int, Sequence[int] | torch.Tensor],
        routing_weights: torch.Tensor,
        output: torch.Tensor,
        most_rows: int | None = None,
    ) -> None:
        """Run each expert once over all tokens that chose it; blocks while experts are read.

        Args:
            hidden_states: `[tokens, d_model]`.
            tokens_of: For each expert that is wanted the rows of its tokens, each once, ascending.
            routing_weights: `[tokens, 1]`.
            output: `[tokens, d_model]`, written at those rows; may be `hidden_states` itself.
            most_rows: Tokens to run an expert with at a time, if scratch memory must be bounded.

        Raises:
            CorruptCheckpointError: An expert cannot be read.
        """
        keys = [ExpertKey(self._stack, self._block, expert) for expert in sorted(tokens_of)]
        tokens_of = _brought(tokens_of, hidden_states.device)
        # Closed at once if anything fails or Ctrl-C comes: else reads would still be under way at the next call.
        with closing(self.levels.on(hidden_states.device).stream(keys)) as stream:
            for key, weights in stream:
                tokens = tokens_of[key.expert]
                if len(tokens) == len(hidden_states) <= (most_rows or len(tokens)):
                    # All of them, as when a single input is decoded: nothing to pick.
                    torch.mul(self._run(weights, hidden_states), routing_weights, out=output)
                    continue
                all_rows = torch.as_tensor(tokens, device=hidden_states.device)
                for rows in torch.split(all_rows, most_rows or len(tokens)):
                    expert_output = self._run(weights, hidden_states[rows]) * routing_weights[rows]
                    output.index_copy_(0, rows, expert_output.to(output.dtype))

    def _run(self, weights: ExpertWeights, tokens: torch.Tensor) -> torch.Tensor:
        return multiply(self._activation(multiply(tokens, weights.wi)), weights.wo)

    def _live(self, chosen: Mapping[int, int]) -> Iterable[int]:
        """Give the positions that have an expert and count; note those that count and were dropped."""
        live, dropped = self._context.live, self._context.dropped
        if live is None:
            return chosen
        flat = [token for row in live for token in row]
        if dropped is not None:
            for position, counts in enumerate(flat):
                if counts and position not in chosen:
                    dropped[position // len(live[0])] += 1
        return [position for position in chosen if flat[position]]


def _brought(
    tokens_of: Mapping[int, Sequence[int] | torch.Tensor], device: torch.device
) -> Mapping[int, Sequence[int] | torch.Tensor]:
    """Bring the rows of several experts to a GPU at once: each transfer waits for all that is being computed there."""
    if device.type == "cpu" or len(tokens_of) < 2:
        return tokens_of
    rows = [torch.as_tensor(tokens) for tokens in tokens_of.values()]
    parts = torch.split(torch.cat(rows).to(device), [len(tokens) for tokens in rows])
    return dict(zip(tokens_of, parts, strict=True))
