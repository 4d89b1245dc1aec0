"""Ternary matrices, compressed to less than a bit a weight as QMoE does (Frantar and Alistarh 2023, arXiv:2310.16795).

Each element of a row is 0, the row's minimum or the row's maximum: a digit 0, 1 or 2. A code of 16 bits stands for one
of the 65,536 likeliest sequences of 2 to 28 digits. The dictionary of these is not stored: `c/qmoe_dictionary.c` and
`_dictionary_table` make the same one.

On a CPU the product is fused with decoding, in C. On a GPU, and where the package was built without its kernels, some
rows at a time are decoded by torch, which is slow on a CPU, and multiplied as any others.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from functools import cache

import torch

from switchrun.errors import CorruptCheckpointError
from switchrun.kernels import native
from switchrun.kernels.blocks import linear_by_blocks, rows_of
from switchrun.machine.processor import has_bf16_instructions

#: What the dictionary assumes of a digit; from the authors' code, https://github.com/IST-DASLab/qmoe.
_PROBABILITIES = (0.885, 0.0575, 0.0575)
_MOST_PAIRS = 14
#: From so many tokens on, decoding once and multiplying in bfloat16 beats the fused product, where torch has
#: instructions for it. Without them the fused product, which skips zeros, is always faster.
_DECODE_TOKENS = 96


@dataclass(frozen=True, slots=True)
class QmoeMatrix:
    """A ternary matrix `[rows, columns]`.

    Attributes:
        codes: int16 `[codes]`, each to be read as unsigned.
        offsets: int32 `[rows + 1]`, where the codes of each row begin.
        extremes: bfloat16 `[2 × rows]`, the minimum and the maximum of each row.
        place: Where it comes from, for messages: a file and a tensor.
    """

    codes: torch.Tensor
    offsets: torch.Tensor
    extremes: torch.Tensor
    columns: int
    place: str = "a matrix"

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return len(self.offsets) - 1

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x @ weight.T`, in the dtype of `x`; a CorruptCheckpointError if it cannot be decoded."""
        try:
            return linear_qmoe(x, self)
        except native.DamagedMatrixError as error:
            raise CorruptCheckpointError(f"{self.place}: {error}", "the file is damaged; download it again") from error


def linear_qmoe(x: torch.Tensor, matrix: QmoeMatrix) -> torch.Tensor:
    """Multiply with a ternary matrix: `x @ weight.T`.

    `x` is `[..., columns]`, float32 or bfloat16; the result is `[..., rows]`, in the dtype of `x`, from float32 sums.
    CUDA has not been run yet. A `native.DamagedMatrixError` names the row that cannot be decoded.
    """
    tokens = rows_of(x, matrix.columns)
    if (int(matrix.offsets[0]), int(matrix.offsets[-1])) != (0, len(matrix.codes)):
        raise native.DamagedMatrixError(f"row offsets do not go from 0 to the {len(matrix.codes)} codes")
    many = len(tokens) >= _DECODE_TOKENS and x.dtype is torch.bfloat16 and has_bf16_instructions()
    if x.device.type == "cpu" and native.available() and not many:
        result = native.linear_qmoe(tokens, matrix.codes, matrix.offsets, matrix.extremes).to(x.dtype)
        return result.view(*x.shape[:-1], matrix.rows)

    shape = (matrix.rows, matrix.columns)

    def unpack(rows: slice, to: torch.Tensor) -> None:
        if to.dtype is torch.bfloat16:
            decode(matrix, rows, to)
        else:
            to.copy_(decode(matrix, rows))

    result = linear_by_blocks(tokens, shape, unpack).to(x.dtype)
    return result.view(*x.shape[:-1], matrix.rows)


def decode(matrix: QmoeMatrix, rows: slice | None = None, to: torch.Tensor | None = None) -> torch.Tensor:
    """Write some rows, or all, to a bfloat16 tensor `[rows, columns]`, by default a new one, and return it.

    A `native.DamagedMatrixError` names a damaged row.
    """
    rows = rows or slice(0, matrix.rows)
    if to is None:
        to = torch.empty(rows.stop - rows.start, matrix.columns, dtype=torch.bfloat16, device=matrix.codes.device)
    if matrix.codes.device.type == "cpu" and native.available():
        parts = matrix.codes, matrix.offsets, matrix.extremes
        native.unpack_qmoe(*parts, to, rows.start, rows.stop)
        return to
    return to.copy_(_decode_by_torch(matrix, rows))


def encode(digits: torch.Tensor, extremes: torch.Tensor) -> QmoeMatrix:
    """Encode digits, uint8 `[rows, columns]`, by the longest match; the columns are even. Needs the C kernels."""
    codes, offsets = native.encode_qmoe(digits)
    return QmoeMatrix(codes, offsets, extremes, digits.shape[1])


def _decode_by_torch(matrix: QmoeMatrix, rows: slice) -> torch.Tensor:
    columns, count = matrix.columns, rows.stop - rows.start
    offsets = matrix.offsets[rows.start : rows.stop + 1].long()
    inside = (offsets >= 0) & (offsets <= len(matrix.codes))
    _require(rows, inside[1:] & inside[:-1] & (offsets[1:] >= offsets[:-1]), 1)
    codes = matrix.codes[offsets[0] : offsets[-1]].to(torch.int32) & 0xFFFF
    entries = _dictionary_table(matrix.codes.device)[codes]
    lengths = entries & 31
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    filled = ends[offsets - offsets[0]] == torch.arange(count + 1, device=offsets.device) * columns
    _require(rows, filled[1:], 3)
    result = torch.zeros(count * columns, dtype=torch.bfloat16, device=offsets.device)
    starts = ends[:-1]
    row_of = starts // max(1, columns)  # every row is full
    values = matrix.extremes[2 * rows.start : 2 * rows.stop]
    for i in range(3):  # a codeword has no more digits that are not zero
        digits = entries >> (20 + 2 * i) & 3
        used = digits > 0
        places = starts + (entries >> (5 + 5 * i) & 31)
        result[places[used]] = values[(2 * row_of + digits - 1)[used]]
    return result.view(count, columns)


def _require(rows: slice, right: torch.Tensor, wrong: int) -> None:
    if not right.all():
        raise native.damaged(rows.start + int((~right).nonzero()[0]), wrong)


@cache
def _dictionary_table(device: torch.device) -> torch.Tensor:
    """Return the table that decodes, int64 `[65536]`, laid out as in `c/qmoe.c`; without the C kernels in a second."""
    if device.type != "cpu":
        return _dictionary_table(torch.device("cpu")).to(device)
    if native.available():
        return native.dictionary().table.long()
    return torch.tensor([_entry(word) for word in codewords()])


def codewords() -> list[tuple[int, ...]]:
    """Return the sequences of pairs that the codes stand for; a pair is first digit + 3 × second digit."""
    # In the order of c/qmoe_dictionary.c: equally likely ones by their pairs.
    likely = [a * b for a, b in itertools.product(_PROBABILITIES, repeat=2)]
    heap: list[tuple[float, tuple[int, ...]]] = [(-1.0, ())]
    words: list[tuple[int, ...]] = []
    while len(words) <= native.QMOE_WORDS:
        probability, word = heapq.heappop(heap)
        words.append(word)
        if len(word) < _MOST_PAIRS:
            for pair, chance in enumerate(likely):
                heapq.heappush(heap, (probability * chance, (*word, pair)))
    return words[1:]


def _entry(word: tuple[int, ...]) -> int:
    digits = [digit for pair in word for digit in (pair % 3, pair // 3)]
    entry = len(digits)
    for i, place in enumerate(place for place, digit in enumerate(digits) if digit):
        entry |= place << (5 + 5 * i) | digits[place] << (20 + 2 * i)
    return entry
