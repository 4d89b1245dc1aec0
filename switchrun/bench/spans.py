"""Span corruption, T5's pre-training task: passages with spans taken out, and the targets that name them. No torch.

After Raffel et al. 2020 (https://arxiv.org/abs/1910.10683), section 3.1.4: 15 % of a passage's tokens, in spans of 3 on
average, each replaced by a sentinel. The target is each sentinel and its span, one more sentinel, and the end.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from switchrun.errors import InputError

NOISE = 0.15
MEAN_SPAN = 3
#: Of fewer tokens, 15 % are less than half a token.
LEAST_TOKENS = 4
#: One stands for a span, and another one ends the target.
LEAST_SENTINELS = 2
#: No vocabulary has longer words by far: what lies behind is cut before it is tokenised.
_MAX_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True, slots=True)
class Passage:
    """One corrupted passage, as ids: what the encoder reads and what the decoder should say, each with its end mark."""

    inputs: tuple[int, ...]
    target: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Passages:
    """A text's passages in order; `skipped` lines were too short for a span, `cut` ones longer than the model takes."""

    usable: tuple[Passage, ...]
    skipped: int
    cut: int


def span_starts(count: int, rng: random.Random, most: int | None = None) -> list[tuple[int, int]]:
    """Choose the spans to take out of `count` tokens, at least 2, as (start, length) from left to right.

    No two touch. Where sentinels are few, `most` bounds the spans, which are longer then.
    """
    noise = max(1, round(count * NOISE))
    spans = max(1, round(noise / MEAN_SPAN))
    if most is not None:
        spans = min(spans, most)
    lengths = _partition(noise, spans, rng)
    # What lies between spans is cut at random too; a span may stand at the very start or end.
    gaps = _partition(count - noise + 2, spans + 1, rng)
    gaps[0] -= 1
    starts, position = [], 0
    for gap, length in zip(gaps, lengths, strict=False):
        position += gap
        starts.append((position, length))
        position += length
    return starts


def corrupt(ids: Sequence[int], sentinels: Sequence[int], eos: int, rng: random.Random) -> Passage:
    """Take spans out of one passage: at least 2 ids without an end mark, and at least 2 sentinels in order."""
    inputs: list[int] = []
    target: list[int] = []
    position = used = 0
    for start, length in span_starts(len(ids), rng, len(sentinels) - 1):
        inputs += [*ids[position:start], sentinels[used]]
        target += [sentinels[used], *ids[start : start + length]]
        position, used = start + length, used + 1
    return Passage((*inputs, *ids[position:], eos), (*target, sentinels[used], eos))


def make_passages(
    texts: Sequence[str],
    tokenise: Callable[[str], Sequence[int]],
    sentinels: Sequence[int],
    eos: int,
    limit: int,
    seed: int,
) -> Passages:
    """Corrupt a text, a passage a line; the same lines and seed give the same passages, whatever lines follow.

    Args:
        texts: The lines.
        tokenise: Returns the ids of a line, without special tokens.
        sentinels: Their ids, in order.
        eos: The end mark's id.
        limit: Most tokens of an input.
        seed: Decides which spans.

    Raises:
        InputError: A line cannot be tokenised; the message begins with its number.
    """
    usable, skipped, cut = [], 0, 0
    for number, text in enumerate(texts):
        most = limit * _MAX_CHARACTERS_PER_TOKEN
        try:
            ids = tokenise(text[:most])
        except InputError as error:
            raise InputError(f"line {number + 1}: {error.message}", error.hint) from error
        if len(ids) < LEAST_TOKENS:
            skipped += 1
            continue
        # One place is the end mark's.
        cut += len(text) > most or len(ids) > limit - 1
        usable.append(corrupt(ids[: limit - 1], sentinels, eos, random.Random(f"{seed} {number}")))
    return Passages(tuple(usable), skipped, cut)


def _partition(total: int, parts: int, rng: random.Random) -> list[int]:
    """Split total into that many random positive parts."""
    cuts = sorted(rng.sample(range(1, total), parts - 1))
    return [right - left for left, right in zip([0, *cuts], [*cuts, total], strict=True)]
