"""What needs no expert is computed while experts are being read: keys and values of the decoder's cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import EncoderDecoderCache

from switchrun.model.generate import CACHE_ARGUMENT


class CrossAttentionAhead:
    """Computes keys and values for the decoder's blocks to come while its first step would wait for the disk.

    Each block makes them of the encoder's output, which is there from the start, and keeps them for all later steps.
    They are the same products of the same tensor, only earlier, so they are the same to the bit; and all of them are
    kept anyway once the step ends.

    Args:
        model: A Switch model that runs without GPUs, and whose decoder has all of its weights in CPU memory.
    """

    def __init__(self, model: Any) -> None:
        linears = [linear for block in model.decoder.block for linear in _key_and_value(block)]
        self._forwards: list[Callable[[torch.Tensor], torch.Tensor]] = [linear.forward for linear in linears]
        self._states: torch.Tensor | None = None
        self._next = 0
        self._results: dict[int, torch.Tensor] = {}
        for number, linear in enumerate(linears):
            linear.forward = partial(self._forward, number)
        for stack in (model.encoder, model.decoder):
            stack.register_forward_pre_hook(self._begin, with_kwargs=True)

    def step(self) -> bool:
        """Compute the next keys or values, if there are any left; tells whether there were."""
        if self._states is None or self._next == len(self._forwards):
            return False
        number = self._next
        self._next += 1
        self._results[number] = self._forwards[number](self._states)
        return True

    def _begin(self, _stack: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        """Note what the encoder gave, if this is the decoder's first step; forget what an interrupted one has left."""
        self._results.clear()
        cache = kwargs.get(CACHE_ARGUMENT)
        first = isinstance(cache, EncoderDecoderCache) and not any(cache.is_updated.values())
        self._states = kwargs.get("encoder_hidden_states") if first else None
        self._next = 0

    def _forward(self, number: int, states: torch.Tensor) -> torch.Tensor:
        result = self._results.pop(number, None)
        if result is not None and states is self._states:
            return result
        self._next = number + 1
        return self._forwards[number](states)


def _key_and_value(block: Any) -> tuple[nn.Module, nn.Module]:
    attention = block.layer[1].EncDecAttention
    return attention.k, attention.v
