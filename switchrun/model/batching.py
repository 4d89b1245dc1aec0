"""How inputs are divided into batches: those of like length together, as many as memory has room for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
