"""Span corruption: what is taken out can be put back, 15 % of it, in spans of 3, by a seed."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from switchrun.bench.spans import LEAST_TOKENS, MEAN_SPAN, NOISE, Passage, corrupt, make_passages, span_starts

EOS = 1
SENTINELS = range(999, 899, -1)


def put_back(passage: Passage) -> list[int]:
    """Put the spans of the target in the place of their sentinels."""
    spans: dict[int, list[int]] = {}
    for token in passage.target[:-1]:
        if token in SENTINELS:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    whole = []
    for token in passage.inputs[:-1]:
        whole += spans[token] if token in SENTINELS else [token]
    return whole


@given(count=st.integers(LEAST_TOKENS, 600), seed=st.integers(0, 9), most=st.integers(1, 99))
def test_spans_can_be_put_back(count: int, seed: int, most: int) -> None:
    ids = list(range(2, count + 2))
    passage = corrupt(ids, SENTINELS[: most + 1], EOS, random.Random(seed))
    assert put_back(passage) == ids
    assert (passage.inputs[-1], passage.target[-1]) == (EOS, EOS)
    used = [token for token in passage.inputs if token in SENTINELS]
    assert used == list(SENTINELS[: len(used)])
    # One more sentinel ends the target, as in the paper's figure 2.
    assert [token for token in passage.target if token in SENTINELS] == list(SENTINELS[: len(used) + 1])


@given(count=st.integers(LEAST_TOKENS, 600), seed=st.integers(0, 9))
def test_as_much_as_the_paper_takes_out(count: int, seed: int) -> None:
    spans = span_starts(count, random.Random(seed))
    noise = sum(length for _, length in spans)
    assert noise == max(1, round(count * NOISE))
    assert len(spans) == max(1, round(noise / MEAN_SPAN))
    assert all(length > 0 for _, length in spans)
    ends = [start + length for start, length in spans]
    assert all(end < start for end, (start, _) in zip(ends, spans[1:], strict=False))
    assert spans[0][0] >= 0
    assert ends[-1] <= count


def passages(lines: list[str], seed: int = 0, limit: int = 20) -> tuple[tuple[Passage, ...], int, int]:
    made = make_passages(lines, lambda line: [ord(sign) for sign in line], SENTINELS, EOS, limit, seed)
    return made.usable, made.skipped, made.cut


def test_a_seed_decides_and_later_lines_change_nothing() -> None:
    lines = ["abcdefghijklm", "nopqrstuvwxyz", "abcdefghijklm"]
    first = passages(lines)
    assert passages(lines) == first
    assert passages(lines[:2])[0] == first[0][:2]
    assert passages(lines, seed=1) != first
    assert first[0][0] != first[0][2]  # the same line twice has different spans


def test_short_lines_are_skipped_and_long_ones_cut() -> None:
    usable, skipped, cut = passages(["", "abc", "abcd", "a" * 19, "a" * 20, "a" * 5000])
    assert (len(usable), skipped, cut) == (4, 2, 2)
    assert max(len(passage.inputs) for passage in usable) <= 20
