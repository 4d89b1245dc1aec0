"""The loss of many passages at once, layer by layer: every expert is read once however many passages there are.

A pass keeps the hidden states of all its batches in memory and takes them through the model a block at a time:
attention and router for one batch after another, then each expert once, over the tokens of all batches that chose it.
The modules are transformers' own, and expert capacity counts within a sequence, so the outcome is that of one batch
after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from switchrun.bench.spans import Passage
from switchrun.checkpoint.types import ExpertKey, Stack
from switchrun.model.scoring import head_logits

_IGNORED = -100
#: A token's indices and masks, besides its hidden states.
_TOKEN_BYTES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Passages of like length, padded on the right.

    Attributes:
        rows: Their positions in the text.
        input_ids: `[rows, tokens]`; `read` is true where there is no padding.
        labels: `[rows, target tokens]`, -100 for padding; `said` is true where there is none.
    """

    rows: tuple[int, ...]
    input_ids: torch.Tensor
    labels: torch.Tensor
    read: torch.Tensor
    said: torch.Tensor

    @property
    def attention_mask(self) -> torch.Tensor:
        """`[rows, tokens]`, 0 for padding."""
        return self.read.long()


@dataclass(frozen=True, slots=True)
class Score:
    """One passage: the sum of its target tokens' losses in nats, and the likeliest id at each of their places."""

    loss: float
    predictions: list[int]


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a text's passages score, in its order; the largest pass's hidden states, and different experts used."""

    scores: list[Score]
    passes: int
    hidden_bytes: int
    experts: int


def make_batches(passages: Sequence[Passage], batch_size: int) -> list[Batch]:
    """Batch passages by length, so that little is padded; the padding is id 0, which nothing looks at."""
    order = sorted(range(len(passages)), key=lambda row: (len(passages[row].inputs), row))
    batches = []
    for start in range(0, len(order), batch_size):
        rows = tuple(order[start : start + batch_size])
        parts = [torch.tensor(passages[row].inputs) for row in rows]
        targets = [torch.tensor(passages[row].target) for row in rows]
        inputs = pad_sequence(parts, batch_first=True)
        labels = pad_sequence(targets, batch_first=True, padding_value=_IGNORED)
        lengths = torch.tensor(list(map(len, parts)))
        read = torch.arange(inputs.shape[1]) < lengths[:, None]
        batches.append(Batch(rows, inputs, labels, read, labels != _IGNORED))
    return batches


def hidden_bytes(batches: Sequence[Batch], d_model: int, itemsize: int) -> int:
    """Return the memory that the hidden states of a pass over these batches take, at most.

    The encoder's lie there twice while its experts compute: the states and what goes to the experts. Then the
    decoder's do, beside the encoder's last ones.
    """
    encoder = sum(batch.input_ids.numel() for batch in batches)
    decoder = sum(batch.labels.numel() for batch in batches)
    return _hidden_bytes(encoder, decoder, d_model * itemsize)


def split_passes(batches: Sequence[Batch], d_model: int, itemsize: int, allowed_bytes: int) -> list[list[Batch]]:
    """Group batches into passes whose hidden states fit; a single batch always does, for the plan counts it."""
    passes: list[list[Batch]] = []
    encoder = decoder = 0
    for batch in batches:
        encoder, decoder = encoder + batch.input_ids.numel(), decoder + batch.labels.numel()
        if passes and _hidden_bytes(encoder, decoder, d_model * itemsize) <= allowed_bytes:
            passes[-1].append(batch)
        else:
            passes.append([batch])
            encoder, decoder = batch.input_ids.numel(), batch.labels.numel()
    return passes


@torch.no_grad()
def score_passages(
    model: Any,
    passes: Sequence[Sequence[Batch]],
    most_rows: int,
    on_layer: Callable[[int, int], object] = lambda _done, _total: None,
) -> PassResult:
    """Score all passages with the decoder given the right tokens so far (teacher forcing).

    Args:
        model: The model, with `OffloadedExperts` and all dense weights on one device.
        passes: Batches of each pass.
        most_rows: Tokens that an expert may be run with at a time.
        on_layer: Called after each layer, with their number so far and in all passes.
    """
    layers = len(passes) * (len(model.encoder.block) + len(model.decoder.block))
    numbers = count(1)

    def count_layer() -> None:
        on_layer(next(numbers), layers)

    used: set[ExpertKey] = set()
    scores: dict[int, Score] = {}
    for batches in passes:
        encoded = [model.encoder.embed_tokens(batch.input_ids) for batch in batches]
        _run_stack(model.encoder, "encoder", batches, encoded, None, most_rows, used, count_layer)
        decoded = [model.decoder.embed_tokens(_shifted(model, batch.labels)) for batch in batches]
        _run_stack(model.decoder, "decoder", batches, decoded, encoded, most_rows, used, count_layer)
        del encoded
        for batch in batches:
            scores |= _score(model, batch, decoded.pop(0))
    itemsize = model.shared.weight.element_size()
    most = max(hidden_bytes(batches, model.config.d_model, itemsize) for batches in passes)
    return PassResult([scores[row] for row in sorted(scores)], len(passes), most, len(used))


def _shifted(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return the start token, then the targets without their last token, and any id for padding."""
    return F.pad(labels[:, :-1].clamp(min=0), (1, 0), value=model.config.decoder_start_token_id)


def _hidden_bytes(encoder: int, decoder: int, state_bytes: int) -> int:
    return max(2 * encoder, encoder + 2 * decoder) * state_bytes + (encoder + decoder) * _TOKEN_BYTES


def _run_stack(
    stack: Any,
    name: Stack,
    batches: Sequence[Batch],
    states: list[torch.Tensor],
    encoded: Sequence[torch.Tensor] | None,
    most_rows: int,
    used: set[ExpertKey],
    count_layer: Callable[[], None],
) -> None:
    """Take the embedded tokens of all batches through a stack, in place; `encoded` is None for the encoder."""
    for number, block in enumerate(stack.block):
        for at, batch in enumerate(batches):
            state, length = states[at], states[at].shape[1]
            mask = read = _additive(batch.read[:, None, None, :], state.dtype)
            if encoded is not None:
                # A target's padding is on its right, so that the causal mask hides it from all that counts.
                mask = _additive(torch.ones(length, length, dtype=torch.bool).tril()[None, None], state.dtype)
            # All blocks use the first one's bias. One kept for each batch would take more than the hidden states.
            bias = stack.block[0].layer[0].SelfAttention.compute_bias(length, length)
            state = block.layer[0](state, attention_mask=mask, position_bias=bias)[0]
            if encoded is not None:
                state = block.layer[1](state, key_value_states=encoded[at], attention_mask=read)[0]
            states[at] = state
        live = [batch.read if encoded is None else batch.said for batch in batches]
        _feed_forward(block.layer[-1], name, number, states, live, most_rows, used)
        count_layer()
    for at in range(len(states)):
        states[at] = stack.final_layer_norm(states[at])


def _feed_forward(
    layer: Any,
    stack: Stack,
    block: int,
    states: list[torch.Tensor],
    live: Sequence[torch.Tensor],
    most_rows: int,
    used: set[ExpertKey],
) -> None:
    """Add the output of a block's MLP to the states, in place; padding goes to no expert."""
    if not layer.is_sparse:
        for at, state in enumerate(states):
            states[at] = layer(state)
        return
    tokens = states[0].new_empty(sum(int(mask.sum()) for mask in live), states[0].shape[-1])
    active, chosen, weights = [], [], []
    filled = 0
    for state, mask in zip(states, live, strict=True):
        normed = layer.layer_norm(state)
        selected, probabilities, _ = layer.mlp.router(normed)
        kept, choice = selected.max(dim=-1)
        active.append(kept.bool() & mask)
        chosen.append(choice[active[-1]])
        weights.append(probabilities[active[-1]])
        tokens[filled : filled + len(chosen[-1])] = normed[active[-1]]
        filled += len(chosen[-1])
    experts = torch.cat(chosen)
    counts = experts.bincount()
    rows = torch.split(experts.argsort(stable=True), counts.tolist())
    tokens_of = {expert: rows[expert] for expert in counts.nonzero()[:, 0].tolist()}
    used.update(ExpertKey(stack, block, expert) for expert in tokens_of)
    # The experts' output takes their input's place: every token has one expert.
    layer.mlp.experts.compute(tokens, tokens_of, torch.cat(weights), tokens, most_rows)
    done = 0
    for state, mask, choice in zip(states, active, chosen, strict=True):
        state[mask] += tokens[done : done + len(choice)]
        done += len(choice)


def _score(model: Any, batch: Batch, state: torch.Tensor) -> Iterator[tuple[int, Score]]:
    """Yield the losses of a batch's passages."""
    for at, row in enumerate(batch.rows):
        hidden, labels = state[at][batch.said[at]], batch.labels[at][batch.said[at]]
        loss, predictions = 0.0, list[int]()
        for part, logits in head_logits(model, hidden):
            predictions += logits.argmax(-1).tolist()
            loss += float(F.cross_entropy(logits, labels[part], reduction="sum"))
        yield row, Score(loss, predictions)


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
