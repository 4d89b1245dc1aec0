"""Sentinels in texts, and the spans that a model gives for them. No torch.

A sentinel `<extra_id_N>` stands for a missing span; the model answers `<extra_id_0> span <extra_id_1> span …`
(Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 3.1.4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from switchrun.errors import InputError, UsageError
from switchrun.model.records import Span
from switchrun.units import format_count

#: T5's vocabularies end with this many sentinels.
NUM_SENTINELS = 100

_SENTINEL = re.compile(r"<extra_id_(\d{1,9})>", re.ASCII)


def sentinel(number: int) -> str:
    """Return sentinel number `number`."""
    return f"<extra_id_{number}>"


def replace_blanks(text: str, blank: str) -> str:
    """Replace the blanks of a text, such as `A ___ walks into a ___.`, by sentinels, numbered from left to right.

    Of a blank that is one repeated character, a longer run is still one blank.

    Raises:
        UsageError: The blank is empty.
        InputError: The text has both blanks and sentinels.
    """
    if not blank.strip():
        raise UsageError("--blank needs a text that stands for a blank", "for example --blank ___")
    pattern = re.escape(blank) + (f"{re.escape(blank[0])}*" if set(blank) == {blank[0]} else "")
    parts = re.split(pattern, text)
    if len(parts) > 1 and _SENTINEL.search(text):
        raise InputError(f"the text has both sentinels and blanks '{blank}'", "use one kind")
    return "".join(part + (sentinel(i) if i < len(parts) - 1 else "") for i, part in enumerate(parts))


def check_sentinels(text: str) -> int:
    """Check that the sentinels of a text are `<extra_id_0>`, `<extra_id_1>`, … in order, each once; return how many.

    Raises:
        InputError: There is none, or they are out of order or repeated.
    """
    found = _SENTINEL.findall(text)
    numbers = [int(digits) for digits in found]
    for digits, number in zip(found, numbers, strict=True):
        if digits != str(number):
            raise InputError(f"<extra_id_{digits}> is not a sentinel", f"write {sentinel(number)}")
    if not numbers:
        raise InputError(
            "the text has no sentinel, so there is nothing to fill in",
            "write <extra_id_0> where words are missing, in the shell within quotes; or use --blank ___, or "
            "switchrun generate",
        )
    if len(numbers) > NUM_SENTINELS:
        raise InputError(f"the text has {len(numbers)} sentinels, the vocabulary has {NUM_SENTINELS}", "split the text")
    for expected, number in enumerate(numbers):
        if number < expected:
            raise InputError(f"{sentinel(number)} is there twice", "use each sentinel once")
        if number != expected:
            raise InputError(
                f"{sentinel(number)} stands where {sentinel(expected)} should",
                "number the sentinels 0, 1, 2, … in order",
            )
    return len(numbers)


def has_sentinel(text: str) -> bool:
    """Whether there is a sentinel in a text."""
    return _SENTINEL.search(text) is not None


@dataclass(frozen=True, slots=True)
class Filling:
    """A text with sentinels, and a span for each of them, which may be empty.

    Raises:
        InputError: The sentinels are not in order, or the spans are fewer or more, or have sentinels themselves.
    """

    text: str
    spans: Sequence[str]

    def __post_init__(self) -> None:
        count = check_sentinels(self.text)
        if len(self.spans) != count:
            given = format_count(len(self.spans), "span")
            raise InputError(
                f"the text has {format_count(count, 'sentinel')}, but {given} came with it",
                "write one for each sentinel: text<TAB>span<TAB>span",
            )
        if any(has_sentinel(span) for span in self.spans):
            raise InputError("a span has a sentinel in it", "write what stands in the place of the sentinel")
        object.__setattr__(self, "spans", tuple(span.strip() for span in self.spans))

    def __str__(self) -> str:
        return self.text

    def target(self, closed: bool) -> str:
        """Return the answer that a model is trained to give; `closed` with the sentinel that ends it."""
        parts = (sentinel(number) + (f" {span}" if span else "") for number, span in enumerate(self.spans))
        return "".join(parts) + (sentinel(len(self.spans)) if closed else "")


def span_places(ids: Sequence[int], sentinel_ids: Sequence[int], closing: int | None) -> dict[int, list[int]]:
    """Return where in a model's answer the tokens of each span are, by the number of its sentinel.

    `sentinel_ids` are those of the input, in order, and `closing` is the next one, which ends the answer. The first
    answer counts if there are several.
    """
    number_of = {token: number for number, token in enumerate(sentinel_ids)}
    spans: dict[int, list[int]] = {}
    current: list[int] | None = None
    for place, token in enumerate(ids):
        number = number_of.get(token)
        if number is not None:
            current = [] if number in spans else spans.setdefault(number, [])
        elif token == closing:
            current = None
        elif current is not None:
            current.append(place)
    return spans


def parse_spans(
    output_ids: Sequence[int],
    sentinel_ids: Sequence[int],
    decode: Callable[[list[int]], str],
    closing: int | None = None,
) -> tuple[Span, ...]:
    """Cut a model's answer at the sentinels; see `span_places`.

    `decode` returns the text of ids, without special tokens.

    Returns:
        One span for each sentinel of the input, in its order.
    """
    places = span_places(output_ids, sentinel_ids, closing)
    return tuple(
        Span(
            sentinel(number),
            decode([output_ids[place] for place in places[number]]).strip() if number in places else None,
        )
        for number in range(len(sentinel_ids))
    )


def fill_in(text: str, spans: Sequence[Span]) -> str:
    """Put the spans into the text; a sentinel without an answer stays."""
    answers = {span.sentinel: span.text for span in spans}

    def answer(match: re.Match[str]) -> str:
        given = answers.get(match[0])
        return match[0] if given is None else given

    return _SENTINEL.sub(answer, text)
