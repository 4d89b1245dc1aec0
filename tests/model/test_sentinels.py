"""Sentinels in texts and spans in answers, for whatever texts there are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchrun.errors import InputError, UsageError
from switchrun.model.records import Span
from switchrun.model.sentinels import (
    NUM_SENTINELS,
    check_sentinels,
    fill_in,
    parse_spans,
    replace_blanks,
    sentinel,
)

#: Texts that hold no sentinel and no blank, but all that could be taken for a pattern or a template.
PLAIN = st.text(st.sampled_from("ab [x]\\1\\g<0>{}$%(.*)^|\n<>é\u2028"), max_size=12)
#: Ids from here on are sentinels in the made-up vocabulary; what is below is a character.
FIRST = 1 << 21


def characters(ids: Sequence[int]) -> str:
    return "".join(chr(number) for number in ids if number < FIRST)


def spans_of(output: Sequence[int], sentinels: int) -> tuple[Span, ...]:
    return parse_spans(output, range(FIRST, FIRST + sentinels), lambda ids: characters(ids))


def answer(spans: Sequence[str | None]) -> list[int]:
    """What a model would give: each sentinel and then its span, for those that it answers."""
    ids = [0]
    for number, span in enumerate(spans):
        if span is not None:
            ids += [FIRST + number, *map(ord, span)]
    return ids


@given(st.lists(PLAIN.filter(bool), min_size=1, max_size=8))
def test_blanks_become_numbered_sentinels(parts: list[str]) -> None:
    text = replace_blanks("___".join(parts), "___")
    expected = parts[0] + "".join(sentinel(n) + part for n, part in enumerate(parts[1:]))
    assert text == expected
    if len(parts) > 1:
        assert check_sentinels(text) == len(parts) - 1


@pytest.mark.parametrize(
    ("text", "blank", "expected"),
    [
        ("a ___ b", "___", "a <extra_id_0> b"),
        ("a _______ b", "___", "a <extra_id_0> b"),
        ("a __ b", "___", "a __ b"),
        ("____", "_", "<extra_id_0>"),
        ("a [?] b [?][?]", "[?]", "a <extra_id_0> b <extra_id_1><extra_id_2>"),
        ("....", "...", "<extra_id_0>"),
        ("a.b", "...", "a.b"),
        ("a ** b", "*", "a <extra_id_0> b"),
        ("<extra_id_0> b", "___", "<extra_id_0> b"),
        ("", "___", ""),
    ],
)
def test_blanks(text: str, blank: str, expected: str) -> None:
    assert replace_blanks(text, blank) == expected


def test_blanks_and_sentinels_do_not_mix() -> None:
    with pytest.raises(InputError, match="both sentinels and blanks '___'"):
        replace_blanks("<extra_id_0> ___", "___")


@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_an_empty_blank(blank: str) -> None:
    with pytest.raises(UsageError, match="--blank"):
        replace_blanks("a b", blank)


@given(st.lists(PLAIN, min_size=2, max_size=NUM_SENTINELS + 1))
def test_sentinels_in_order_are_counted(parts: list[str]) -> None:
    text = parts[0] + "".join(sentinel(n) + part for n, part in enumerate(parts[1:]))
    assert check_sentinels(text) == len(parts) - 1


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(lambda n: n != list(range(len(n)))))
def test_any_other_order_is_refused(numbers: list[int]) -> None:
    with pytest.raises(InputError, match=r"is there twice|stands where <extra_id_\d+> should"):
        check_sentinels(" ".join(map(sentinel, numbers)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no blank", "the text has no sentinel"),
        ("", "the text has no sentinel"),
        ("<extra_id_>", "the text has no sentinel"),
        ("< extra_id_0>", "the text has no sentinel"),
        ("<extra_id_1>", "<extra_id_1> stands where <extra_id_0> should"),
        ("<extra_id_0> <extra_id_2>", "<extra_id_2> stands where <extra_id_1> should"),
        ("<extra_id_0> <extra_id_0>", "<extra_id_0> is there twice"),
        ("<extra_id_0> <extra_id_1> <extra_id_0>", "<extra_id_0> is there twice"),
        ("".join(map(sentinel, range(101))), "the text has 101 sentinels, the vocabulary has 100"),
    ],
)
def test_texts_that_cannot_be_filled(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_sentinels(text)
    assert caught.value.message.startswith(message)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["<extra_id_00>", "<extra_id_0> <extra_id_01>", "<extra_id_٠>"])
def test_spellings_that_no_vocabulary_has(text: str) -> None:
    """`<extra_id_00>` is not the token `<extra_id_0>`: it would be cut into letters and never be answered."""
    with pytest.raises(InputError):
        check_sentinels(text)


def test_a_number_with_more_digits_than_python_reads() -> None:
    with pytest.raises(InputError):
        check_sentinels(f"<extra_id_{'1' * 5000}>")


@given(st.data())
def test_an_answer_is_put_into_its_places(data: st.DataObject) -> None:
    parts = data.draw(st.lists(PLAIN, min_size=2, max_size=8))
    spans = [data.draw(st.one_of(st.none(), PLAIN)) for _ in parts[1:]]
    text = parts[0] + "".join(sentinel(n) + part for n, part in enumerate(parts[1:]))
    parsed = spans_of(answer(spans), len(spans))
    assert [span.sentinel for span in parsed] == [sentinel(n) for n in range(len(spans))]
    assert [span.text for span in parsed] == [None if span is None else span.strip() for span in spans]
    # Without an answer the sentinel stays; with one, the span is there to the letter: [x], \1 and \g<0> too.
    shown = [sentinel(n) if span is None else span.strip() for n, span in enumerate(spans)]
    assert fill_in(text, parsed) == parts[0] + "".join(a + b for a, b in zip(shown, parts[1:], strict=True))


@given(st.permutations(range(4)))
def test_answers_in_another_order(order: list[int]) -> None:
    output = [token for n in order for token in (FIRST + n, ord("a") + n)]
    assert [span.text for span in spans_of(output, 4)] == ["a", "b", "c", "d"]


def test_a_repeated_sentinel_is_answered_once() -> None:
    output = [FIRST, ord("a"), FIRST + 1, ord("b"), FIRST, ord("c"), ord("d"), FIRST + 2, ord("e")]
    assert [span.text for span in spans_of(output, 3)] == ["a", "b", "e"]


def test_text_before_the_first_sentinel_and_sentinels_of_others() -> None:
    # <extra_id_2> is not in the input, so it is a token like others, which the decoder leaves out.
    output = [0, ord("x"), FIRST, ord("a"), FIRST + 2, ord("b")]
    assert spans_of(output, 2) == (Span(sentinel(0), "ab"), Span(sentinel(1), None))


def test_what_follows_the_closing_sentinel_is_no_part_of_a_span() -> None:
    """As pre-trained models do it: they go on with sentinels that the input has not."""
    output = [0, FIRST, ord("a"), FIRST + 1, ord("b"), FIRST + 2, ord("c"), FIRST + 3, ord("d"), FIRST + 1, ord("e")]
    spans = parse_spans(output, [FIRST, FIRST + 1], characters, closing=FIRST + 2)
    assert [span.text for span in spans] == ["a", "b"]


def test_an_empty_span_is_an_answer() -> None:
    parsed = spans_of([FIRST, FIRST + 1, ord(" ")], 2)
    assert [span.text for span in parsed] == ["", ""]
    assert fill_in("a <extra_id_0>b <extra_id_1>", parsed) == "a b "


def test_a_span_that_looks_like_a_sentinel_is_not_filled_again() -> None:
    spans = (Span(sentinel(0), sentinel(1)), Span(sentinel(1), "b"))
    assert fill_in("<extra_id_0> <extra_id_1>", spans) == "<extra_id_1> b"
