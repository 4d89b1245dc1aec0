"""The loss of many passages at once, layer by layer: every expert is read once however many passages there are.

A pass keeps the hidden states of all its batches in memory and takes them through the model a block at a time:
attention and router for one batch after another, then each expert once, over the tokens of all batches that chose it.
The modules are transformers' own, and expert capacity counts within a sequence, so the outcome is that of one batch
after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from switchrun.bench.spans import Passage
from switchrun.checkpoint.types import ExpertKey, Stack

#: The scores of so many tokens are in memory at a time: a few vocabularies' worth, less than a batch's attention takes.
_HEAD_TOKENS = 64
_IGNORED = -100
#: A token's indices and masks, besides its hidden states.
_TOKEN_BYTES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Passages of like length, padded on the right.

    Attributes:
        rows: Their positions in the text.
        input_ids: `[rows, tokens]`.
        labels: `[rows, target tokens]`, -100 for padding.
        read: Like `input_ids`, true where there is no padding.
        said: Like `labels`, true where there is no padding.
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
    """What a text's passages score, and what computing that took.

    Attributes:
        scores: One for each passage, in the order of the text.
        passes: How often the model was gone through.
        hidden_bytes: Memory that the hidden states of the largest pass took.
        experts: Different experts that were used.
    """

    scores: list[Score]
    passes: int
    hidden_bytes: int
    experts: int


def make_batches(passages: Sequence[Passage], batch_size: int, pad: int) -> list[Batch]:
    """Batch passages by length, so that little is padded."""
    order = sorted(range(len(passages)), key=lambda row: (len(passages[row].inputs), row))
    batches = []
    for start in range(0, len(order), batch_size):
        rows = tuple(order[start : start + batch_size])
        inputs = _padded([passages[row].inputs for row in rows], pad)
        lengths = torch.tensor([len(passages[row].inputs) for row in rows])
        labels = _padded([passages[row].target for row in rows], _IGNORED)
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
def score_passages(model: Any, passes: Sequence[Sequence[Batch]], most_rows: int) -> PassResult:
    """Score all passages with the decoder given the right tokens so far (teacher forcing).

    Args:
        model: The model, with `OffloadedExperts` and all dense weights on one device.
        passes: Batches of each pass.
        most_rows: Tokens that an expert may be run with at a time.

    Raises:
        CorruptCheckpointError: An expert cannot be read.
    """
    used: set[ExpertKey] = set()
    scores: dict[int, Score] = {}
    for batches in passes:
        encoded = _encode(model, batches, most_rows, used)
        decoded = _decode(model, batches, encoded, most_rows, used)
        del encoded
        for batch in batches:
            scores |= _score(model, batch, decoded.pop(0))
    itemsize = model.shared.weight.element_size()
    most = max(hidden_bytes(batches, model.config.d_model, itemsize) for batches in passes)
    return PassResult([scores[row] for row in sorted(scores)], len(passes), most, len(used))


def _hidden_bytes(encoder: int, decoder: int, state_bytes: int) -> int:
    return max(2 * encoder, encoder + 2 * decoder) * state_bytes + (encoder + decoder) * _TOKEN_BYTES


def _encode(model: Any, batches: Sequence[Batch], most_rows: int, used: set[ExpertKey]) -> list[torch.Tensor]:
    stack = model.encoder
    states = [stack.embed_tokens(batch.input_ids) for batch in batches]
    for number, block in enumerate(stack.block):
        for at, batch in enumerate(batches):
            mask = _additive(batch.read[:, None, None, :], states[at].dtype)
            states[at] = _attend(stack, block.layer[0], states[at], mask)
        _feed_forward(block.layer[-1], "encoder", number, states, [b.read for b in batches], most_rows, used)
    for at in range(len(states)):
        states[at] = stack.final_layer_norm(states[at])
    return states


def _decode(
    model: Any, batches: Sequence[Batch], encoded: Sequence[torch.Tensor], most_rows: int, used: set[ExpertKey]
) -> list[torch.Tensor]:
    stack = model.decoder
    # transformers' own shift: the start token, then the target without its last token.
    states = [stack.embed_tokens(model._shift_right(batch.labels)) for batch in batches]
    for number, block in enumerate(stack.block):
        for at, batch in enumerate(batches):
            length = batch.labels.shape[1]
            # A target's padding is on its right, so that the causal mask hides it from all that counts.
            causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            state = _attend(stack, block.layer[0], states[at], _additive(causal, states[at].dtype))
            cross = _additive(batch.read[:, None, None, :], state.dtype)
            states[at] = block.layer[1](state, key_value_states=encoded[at], attention_mask=cross)[0]
        _feed_forward(block.layer[-1], "decoder", number, states, [b.said for b in batches], most_rows, used)
    for at in range(len(states)):
        states[at] = stack.final_layer_norm(states[at])
    return states


def _attend(stack: Any, layer: Any, state: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    # All blocks use the first one's bias. Keeping one for each batch would take more memory than the hidden states.
    bias = stack.block[0].layer[0].SelfAttention.compute_bias(state.shape[1], state.shape[1])
    attended: torch.Tensor = layer(state, attention_mask=mask, position_bias=bias)[0]
    return attended


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
    """Yield the losses of a batch's passages; scores of all tokens at once would be the largest tensor by far."""
    if model.config.tie_word_embeddings:
        state = state * model.model_dim**-0.5
    for at, row in enumerate(batch.rows):
        hidden, labels = state[at][batch.said[at]], batch.labels[at][batch.said[at]]
        loss, predictions = 0.0, list[int]()
        for start in range(0, len(labels), _HEAD_TOKENS):
            part = slice(start, start + _HEAD_TOKENS)
            scores = model.lm_head(hidden[part])
            predictions += scores.argmax(-1).tolist()
            loss += float(F.cross_entropy(scores.float(), labels[part], reduction="sum"))
        yield row, Score(loss, predictions)


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
