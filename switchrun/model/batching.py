"""How inputs are taken, one or many, and divided into batches: those of like length, as many as memory has room for."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, TypeVar

from switchrun.errors import UsageError

_Answer = TypeVar("_Answer")

#: Of an iterator so many inputs are taken at a time, if nobody says how many.
WINDOW = 512

#: What padding may add to a batch: as many tokens as it has, and so many more. A batch reads its experts once, which
#: costs more than some padding, but a long input among many short ones would make hundreds of them as long as itself.
_FREE_PADDING = 512


def batches_of(lengths: Sequence[int], fits: Callable[[int, int], bool]) -> list[list[int]]:
    """Divide inputs of so many tokens into batches; returns the indices of each batch's inputs.

    `fits` says whether there is room for so many rows, the longest one of so many tokens; one input is a batch even if
    it says no.
    """
    batches: list[list[int]] = []
    longest = real = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        rows = len(batches[-1]) + 1 if batches else 0
        real += lengths[index]
        if rows and rows * longest <= 2 * real + _FREE_PADDING and fits(rows, longest):
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = real = lengths[index]
    return batches


def one_or_many(
    given: Any,
    kinds: tuple[type, ...],
    ids: Iterable[int] | None,
    window: int,
    answer: Callable[[list[Any], list[int]], list[_Answer]],
) -> _Answer | list[_Answer] | Iterator[_Answer]:
    """Answer one input, a list of them, or those of an iterator as their answers are asked for, so many at a time.

    Raises:
        UsageError: An input is of none of these kinds, or there are fewer ids than inputs.
    """
    numbers = count() if ids is None else iter(ids)

    def answer_all(inputs: list[Any]) -> list[_Answer]:
        for wrong in (each for each in inputs if not isinstance(each, kinds)):
            name = "texts" if str in kinds else "fillings"
            raise UsageError(f"{name}: {reprlib.repr(wrong)} is no {kinds[0].__name__}", option=name)
        numbered = list(islice(numbers, len(inputs)))
        if len(numbered) < len(inputs):
            raise UsageError(f"ids: {len(numbered)} for {len(inputs)} inputs", option="ids")
        return answer(inputs, numbered)

    def answer_windows(rest: Iterator[Any]) -> Iterator[_Answer]:
        while inputs := list(islice(rest, window)):
            yield from answer_all(inputs)

    if isinstance(given, Iterator):
        return answer_windows(given)
    if isinstance(given, Iterable) and not isinstance(given, kinds):
        return answer_all(list(given))
    return answer_all([given])[0]
