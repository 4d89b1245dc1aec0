"""Which experts a model's routers choose, heard while a batch runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from switchrun.checkpoint.types import Stack
from switchrun.model.records import LayerRouting

_STACKS: tuple[Stack, Stack] = ("encoder", "decoder")
#: Experts, their probabilities, and whether the token was dropped; each `[rows, tokens]`.
_Choices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class RouterRecorder:
    """Keeps what each router of a model chooses until it is taken; a context manager. Without one nothing is kept."""

    def __init__(self, model: Any) -> None:
        self._layers: dict[tuple[Stack, int], list[_Choices]] = {}
        self._hooks = [
            block.layer[-1].mlp.router.register_forward_hook(self._listen(self._layers.setdefault((stack, number), [])))
            for stack in _STACKS
            for number, block in enumerate(getattr(model, stack).block)
            if block.layer[-1].is_sparse
        ]

    def take(self, lengths: Sequence[int]) -> list[tuple[LayerRouting, ...]]:
        """Return for each row the choices so far for its first tokens, as many as its length says; and forget them.

        The runs so far had the same rows, each run more tokens of them: all at once, or one after another.
        """
        found: list[tuple[LayerRouting, ...]] = [()] * len(lengths)
        for (stack, block), heard in self._layers.items():
            if heard and lengths:
                experts, probabilities, dropped = (torch.cat(parts, dim=1) for parts in zip(*heard, strict=True))
                for row, length in enumerate(lengths):
                    found[row] += (
                        LayerRouting(
                            stack,
                            block,
                            tuple(experts[row, :length].tolist()),
                            tuple(probabilities[row, :length].tolist()),
                            tuple(dropped[row, :length].nonzero().flatten().tolist()),
                        ),
                    )
            heard.clear()
        return found

    def __enter__(self) -> RouterRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @staticmethod
    def _listen(heard: list[_Choices]) -> Any:
        def listen(router: Any, _inputs: object, output: tuple[torch.Tensor, ...]) -> None:
            selected, probability, logits = output
            # As the router itself does it: what it selected is zero for a dropped token.
            likeliest = logits.softmax(dim=-1, dtype=router.dtype).to(router.input_dtype).argmax(dim=-1)
            choices = likeliest, probability[..., 0].float(), selected.sum(dim=-1) == 0
            heard.append((choices[0].cpu(), choices[1].cpu(), choices[2].cpu()))

        return listen
