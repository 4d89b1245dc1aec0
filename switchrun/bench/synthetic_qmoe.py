"""A synthetic checkpoint as QMoE stores one: ternary experts of which 88.5 % are zeros, in codes of 16 bits.

`noexp.pt` holds what is no expert, `exp00.pt` and so on the experts of a sparse layer each, `sizes.pt` how many codes a
matrix has.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from switchrun.bench.torch_zip import StoredTensor, write_torch_zip
from switchrun.checkpoint.names import EMBEDDINGS, HEAD, SHARED, STACKS, expert_prefix
from switchrun.checkpoint.qmoe import DENSE, SIZES, part_file
from switchrun.errors import UsageError

#: A hole still has a block of the disk before each of its tensors that is not empty.
HOLE_BYTES = 6 * 4096


class Measures(NamedTuple):
    """What the files depend on: a matrix, layers with experts (of each stack), experts, and those with real bytes."""

    d_model: int
    d_ff: int
    sparse_blocks: list[int]
    num_experts: int
    real_experts: int


def expert_bytes(d_model: int, d_ff: int) -> int:
    """Return about how many bytes an expert takes: 0.74 bit a weight for its codes; offsets and extremes of rows."""
    return round(2 * d_model * d_ff * 0.74 / 8) + 8 * (d_model + d_ff + 1)


def check_kernels() -> None:
    """Refuse to make such a checkpoint where nothing can encode it."""
    from switchrun.kernels import native

    if not native.available():
        raise UsageError(
            "--synthetic: to make a checkpoint of QMoE's kind takes the kernels in C, which are not built or are off",
            "see switchrun doctor",
        )


def write_qmoe(
    folder: Path,
    measures: Measures,
    dense: dict[str, StoredTensor],
    on_layer: Callable[[int, int], None] = lambda _done, _total: None,
) -> int:
    """Write the files of weights, and return the number of tensors; `dense` is what is no expert.

    `on_layer` is called after each layer's experts, with their number so far and in all.
    """
    import torch

    # As in the published files, where the embedding has all its names.
    dense = dict.fromkeys((*EMBEDDINGS, HEAD), dense[SHARED]) | dense
    write_torch_zip(folder / DENSE, dense)
    tensors, sizes = len(dense), {}
    wi, wo = _Rows(measures.d_ff, measures.d_model), _Rows(measures.d_model, measures.d_ff)
    layers = list(itertools.product(STACKS, measures.sparse_blocks))
    for number, (stack, block) in enumerate(layers):
        experts: dict[str, StoredTensor] = {}
        for expert in range(measures.num_experts):
            for name, rows in (("wi", wi), ("wo", wo)):
                matrix = f"{expert_prefix(stack, block, expert)}.{name}"
                parts = rows.next() if expert < measures.real_experts else rows.hole()
                experts |= {f"{matrix}.{part}": stored for part, stored in parts.items()}
                sizes[matrix] = parts["w_comp"].count
        write_torch_zip(folder / part_file(number), experts)
        tensors += len(experts)
        on_layer(number + 1, len(layers))
    torch.save(sizes, folder / SIZES)
    return tensors


class _Rows:
    """Twice as many encoded rows as a matrix has: each matrix is another stretch of them.

    To encode every expert would take longer than writing it.
    """

    def __init__(self, rows: int, columns: int) -> None:
        import torch

        from switchrun.kernels import qmoe

        generator = torch.Generator().manual_seed(rows)
        chance = torch.randint(0, 2000, (2 * rows, columns), generator=generator, dtype=torch.int16)
        digits = (chance >= 1770).to(torch.uint8) + (chance >= 1885).to(torch.uint8)  # 88.5 % zeros, as many 1 as 2
        # The product is about as large as what comes in.
        scale = (0.115 * columns) ** -0.5
        values = (0.5 + torch.rand(2 * rows, 2, generator=generator)) * torch.tensor([-scale, scale])
        encoded = qmoe.encode(digits, values.flatten().bfloat16())
        self._rows, self._offsets = rows, encoded.offsets
        self._codes = memoryview(encoded.codes.view(torch.uint8).numpy().tobytes())
        self._extremes = memoryview(encoded.extremes.view(torch.uint8).numpy().tobytes())
        self._turn = 0

    def next(self) -> dict[str, StoredTensor]:
        """Return the next matrix."""
        self._turn = (self._turn + 1009) % (self._rows + 1)
        start, end = self._turn, self._turn + self._rows
        first, last = int(self._offsets[start]), int(self._offsets[end])
        return self._parts(
            last - first,
            lambda: [self._codes[2 * first : 2 * last]],
            lambda: [(self._offsets[start : end + 1] - first).numpy().tobytes()],
            lambda: [self._extremes[4 * start : 4 * end]],
        )

    def hole(self) -> dict[str, StoredTensor]:
        """Return a matrix without bytes, of the usual size."""
        return self._parts(int(self._offsets[-1]) // 2, None, None, None)

    def _parts(self, codes: int, *pieces: Callable[[], Iterable[bytes | memoryview]] | None) -> dict[str, StoredTensor]:
        return {
            "w_comp": StoredTensor("I16", (codes,), pieces[0]),
            "row_off": StoredTensor("I32", (self._rows + 1,), pieces[1]),
            "ter_minmax": StoredTensor("BF16", (2 * self._rows,), pieces[2]),
            "weight": StoredTensor("BF16", (0,), None),
        }
