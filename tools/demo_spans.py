"""Blank out words as T5 does, and batch the results.

Half of the examples get span corruption (15 % of the words and marks, spans of 3 on average), half get
several single-word blanks, which is how people write prompts. Spans are made of whole words and marks.
Early in a run a share of the examples gets one long span instead.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from demo_tokenizer import Units, split_units

from switchrun.bench.spans import span_starts

EOS, PAD, IGNORE = 1, 0, -100


@dataclass(frozen=True)
class Example:
    """One text as units: the words, their ids after their left neighbour, and their ids after a sentinel."""

    words: tuple[str, ...]
    natural: tuple[list[int], ...]
    spaced: tuple[list[int], ...]
    length: int


@dataclass(frozen=True)
class Blanked:
    """Encoder input, decoder target, and the words behind each blank."""

    inputs: list[int]
    target: list[int]
    answers: tuple[str, ...]


def prepare(texts: list[str], units: Units) -> list[Example]:
    """Tokenise texts once, unit by unit."""
    examples = []
    for text in texts:
        parts = split_units(text)
        natural = tuple(units.ids(word, space) for word, space in parts)
        spaced = tuple(units.ids(word, True) for word, _ in parts)
        examples.append(Example(tuple(w for w, _ in parts), natural, spaced, sum(map(len, natural))))
    return examples


def single_words(words: tuple[str, ...], rng: random.Random, at_most: int = 8) -> list[tuple[int, int]]:
    """Between one blank and a quarter of the words, no two of them neighbours."""
    places = [index for index, word in enumerate(words) if word[0].isalpha()]
    wanted = rng.randint(1, max(1, min(at_most, len(places) // 4)))
    rng.shuffle(places)
    chosen: set[int] = set()
    for place in places:
        if len(chosen) < wanted and not {place - 1, place + 1} & chosen:
            chosen.add(place)
    return [(place, 1) for place in sorted(chosen)]


def blank(example: Example, spans: list[tuple[int, int]], units: Units) -> Blanked:
    """Replace the spans by sentinels; the target ends with one more sentinel and the end mark, as in the paper."""
    inputs: list[int] = []
    target: list[int] = []
    answers = []
    position = 0
    for index, (start, length) in enumerate(spans):
        for place in range(position, start):
            inputs += (example.spaced if place == position and index else example.natural)[place]
        inputs.append(units.sentinel(index))
        target.append(units.sentinel(index))
        for place in range(start, start + length):
            target += example.natural[place]
        answers.append(" ".join(example.words[start : start + length]))
        position = start + length
    for place in range(position, len(example.words)):
        inputs += (example.spaced if place == position and spans else example.natural)[place]
    target.append(units.sentinel(len(spans)))
    return Blanked([*inputs, EOS], [*target, EOS], tuple(answers))


def long_span(count: int, rng: random.Random) -> list[tuple[int, int]]:
    """One span of a third to two thirds of the text, anywhere.

    With 15 % blanked, a short training run sees few words to predict. Long spans teach the decoder the language
    several times faster; they are for the first part of a run only, since nobody blanks half a sentence.
    """
    length = rng.randint(max(1, count // 3), max(1, 2 * count // 3))
    return [(rng.randint(0, count - length), length)]


def corrupt(example: Example, units: Units, rng: random.Random, long_share: float = 0.0) -> Blanked:
    """Blank one example for training: span corruption or single words, half each, after the share of long spans."""
    if rng.random() < long_share:
        return blank(example, long_span(len(example.words), rng), units)
    if rng.random() < 0.5:
        spans = single_words(example.words, rng)
        if spans:
            return blank(example, spans, units)
    return blank(example, span_starts(len(example.words), rng), units)


def batch_order(examples: list[Example], tokens: int, seed: int) -> list[list[int]]:
    """One epoch: batches of examples of like length, at most that many padded tokens each, in random order."""
    rng = random.Random(seed)
    order = list(range(len(examples)))
    rng.shuffle(order)
    batches = []
    for start in range(0, len(order), 8192):
        pool = sorted(order[start : start + 8192], key=lambda index: examples[index].length)
        current: list[int] = []
        for index in pool:
            if current and (len(current) + 1) * (examples[index].length + 1) > tokens:
                batches.append(current)
                current = []
            current.append(index)
        batches.append(current)
    rng.shuffle(batches)
    return batches


def forever(examples: list[Example], tokens: int, seed: int, skip: int) -> Iterator[list[int]]:
    """Batches epoch after epoch, the same for the same seed, without the first skip (for resuming)."""
    epoch = 0
    while True:
        order = batch_order(examples, tokens, seed + epoch)
        yield from order[skip:]
        skip = max(0, skip - len(order))
        epoch += 1


def collate(blanked: list[Blanked]) -> dict[str, torch.Tensor]:
    """Pad to a batch for the transformers model; the decoder reads the target shifted right."""

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])

    inputs = padded([b.inputs for b in blanked], PAD)
    return {
        "input_ids": inputs,
        "attention_mask": (inputs != PAD).long(),
        "decoder_input_ids": padded([[PAD, *b.target[:-1]] for b in blanked], PAD),
        "labels": padded([b.target for b in blanked], IGNORE),
    }
