"""The tensors of a checkpoint as compact rows; a `TensorSlice` is built only when somebody asks for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from switchrun.checkpoint.types import TensorSlice


def plausible(numbers: Iterable[object]) -> bool:
    """Whether a header's sizes and offsets are whole numbers that a tensor can have.

    Files are not to be trusted: beyond 64 bits even to print a number can fail.
    """
    values = list(numbers)
    return len(values) < 100 and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


class Entry(NamedTuple):
    """One tensor as a container's header tells it: like a `TensorSlice`, without the file."""

    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    transposed: bool = False


class Kind(NamedTuple):
    """What many tensors have in common; a checkpoint with 120,000 tensors has a dozen of these."""

    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    transposed: bool


class Row(NamedTuple):
    """One tensor: the number of its file, its first byte there, and the number of its kind."""

    file: int
    offset: int
    kind: int


class TensorTable(Mapping[str, TensorSlice]):
    """All tensors of a checkpoint by the names they have in its files.

    Attributes:
        files: The weights files' absolute paths.
        kinds: The distinct kinds.
        rows: `(file, offset, kind)` of every tensor, as a `Row` or a plain tuple of the same order.
    """

    def __init__(
        self, files: tuple[Path, ...], kinds: tuple[Kind, ...], rows: Mapping[str, tuple[int, int, int]]
    ) -> None:
        self.files = files
        self.kinds = kinds
        self.rows = rows

    def __getitem__(self, name: str) -> TensorSlice:
        file, offset, number = self.rows[name]
        kind = self.kinds[number]
        return TensorSlice(self.files[file], offset, kind.nbytes, kind.dtype, kind.shape, kind.transposed)

    def __contains__(self, name: object) -> bool:
        return name in self.rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)
