"""How likely given answers are: the encoder once, then the decoder once over the whole answers (teacher forcing)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from switchrun.errors import ModelError
from switchrun.experts.module import RoutingContext
from switchrun.planning.memory import HEAD_TOKENS


@dataclass(frozen=True, slots=True)
class RawScore:
    """The log-probability of each target token of a row, in nats; `dropped` were over an expert's capacity."""

    log_probabilities: tuple[float, ...]
    dropped: int


@torch.no_grad()
def score_batch(
    model: Any,
    context: RoutingContext,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    targets: Sequence[Sequence[int]],
) -> list[RawScore]:
    """Score a target for each row of `input_ids`, which is padded on the right as `attention_mask` says."""
    context.live = attention_mask.bool().tolist()
    dropped = context.dropped = [0] * len(targets)
    try:
        encoded = model.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        start = model.config.decoder_start_token_id
        scores = score_targets(model, context, encoded, attention_mask, [(start, *target) for target in targets])
    finally:
        context.live = context.dropped = None
    return [RawScore(*each) for each in zip(scores, dropped, strict=True)]


@torch.no_grad()
def score_targets(
    model: Any,
    context: RoutingContext,
    encoded: torch.Tensor,
    attention_mask: torch.Tensor,
    answers: Sequence[Sequence[int]],
) -> list[tuple[float, ...]]:
    """Return for each answer, which begins with the start token, the log-probabilities of all that follows it.

    One pass of the decoder: an expert is read once, whatever the rows. They are padded on the right, where the causal
    mask hides it, and where tokens come after all that count in an expert's capacity.

    Args:
        model: The model; its raw logits decide.
        context: What its sparse layers share; padding loads no expert.
        encoded: What the encoder made of the rows' inputs, `[rows, tokens, d_model]`.
        attention_mask: `[rows, tokens]`, 0 for their padding.
        answers: Ids, for each row at least the start token.

    Raises:
        ModelError: The logits are no numbers.
    """
    lengths = [len(answer) - 1 for answer in answers]
    if not any(lengths):
        return [()] * len(answers)
    ids = pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True).to(encoded.device)
    live = torch.arange(ids.shape[1] - 1) < torch.tensor(lengths)[:, None]
    context.live = live.tolist()
    states = model.decoder(
        input_ids=ids[:, :-1],
        encoder_hidden_states=encoded,
        encoder_attention_mask=attention_mask,
        use_cache=False,
    ).last_hidden_state
    context.live = None
    live = live.to(states.device)
    wanted = ids[:, 1:].to(states.device)[live]
    found = torch.cat([
        -F.cross_entropy(logits, wanted[part].to(logits.device), reduction="none").cpu()
        for part, logits in head_logits(model, states[live])
    ])  # fmt: skip
    if not found.isfinite().all():
        raise ModelError("the model's scores are no finite numbers, so there are no probabilities", "try --dtype fp32")
    return [tuple(part.tolist()) for part in torch.split(found, lengths)]


def head_logits(model: Any, states: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the float32 logits of a few of the decoder's states `[tokens, d_model]` at a time, and which these are.

    Those of all tokens at once would be the largest tensor by far.
    """
    if model.config.tie_word_embeddings:
        states = states * model.model_dim**-0.5
    for start in range(0, len(states), HEAD_TOKENS):
        part = slice(start, start + HEAD_TOKENS)
        yield part, model.lm_head(states[part]).float()
