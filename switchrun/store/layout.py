"""How an expert's parts (codes and scales) lie in one run of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from switchrun.checkpoint.files import plausible
from switchrun.dtypes import STORED_ITEMSIZE

#: Every part begins at a multiple of this, so that a view of it in a page-aligned buffer suits any kernel.
ALIGNMENT = 64
_PADDING = "padding"


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of an expert, such as `wi.weight`; its offset counts from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """The parts of an expert in the order of their bytes: what is used first lies first.

    A safetensors file must not have holes between its tensors. Where a part's end is not aligned, a tensor of U8
    called `padding.<n>` therefore fills the gap. Common sizes (multiples of 64) need none.

    Attributes:
        tensors: All that the file holds, the padding too.
    """

    tensors: tuple[Part, ...]

    @classmethod
    def of(cls, parts: Iterable[tuple[str, str, tuple[int, ...]]]) -> Layout:
        """Lay out parts (name, safetensors dtype, shape); ValueError without any, or for a name that is taken."""
        tensors: list[Part] = []
        taken: set[str] = set()
        end = 0
        for name, dtype, shape in parts:
            if name.startswith(_PADDING) or name in taken:
                raise ValueError(f"a part cannot be called {name!r}")
            taken.add(name)
            gap = -end % ALIGNMENT
            if gap:
                tensors.append(Part(f"{_PADDING}.{len(tensors)}", "U8", (gap,), end, gap))
                end += gap
            nbytes = math.prod(shape) * STORED_ITEMSIZE[dtype]
            tensors.append(Part(name, dtype, tuple(shape), end, nbytes))
            end += nbytes
        if not tensors:
            raise ValueError("an expert has at least one part")
        return cls(tuple(tensors))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The tensors that mean something."""
        return tuple(part for part in self.tensors if not part.name.startswith(_PADDING))

    @property
    def nbytes(self) -> int:
        """Bytes of the data, from the first part's start to the last one's end."""
        last = self.tensors[-1]
        return last.offset + last.nbytes

    def __getitem__(self, name: str) -> Part:
        for part in self.tensors:
            if part.name == name:
                return part
        raise KeyError(name)

    def to_json(self) -> list[list[Any]]:
        """Return the parts as JSON: name, dtype and shape; where they lie follows."""
        return [[part.name, part.dtype, list(part.shape)] for part in self.parts]

    @classmethod
    def from_json(cls, rows: Any) -> Layout:
        """Read what `to_json` returned, or raise ValueError if it is not that."""
        try:
            parts = [(name, dtype, tuple(shape)) for name, dtype, shape in rows]
            if not all(type(name) is str and type(dtype) is str and plausible(shape) for name, dtype, shape in parts):
                raise TypeError("a name, dtype or shape is none")
            layout = cls.of(parts)
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a layout: {error}") from error
        if not plausible([layout.nbytes]):
            raise ValueError("not a layout: no file is that large")
        return layout


def int8_layout(d_model: int, d_ff: int) -> Layout:
    """Lay out an expert in LLM.int8's row-wise form: codes, and a float32 scale for each row (`SCB`)."""
    return Layout.of(
        [
            ("wi.weight", "I8", (d_ff, d_model)),
            ("wi.SCB", "F32", (d_ff,)),
            ("wo.weight", "I8", (d_model, d_ff)),
            ("wo.SCB", "F32", (d_model,)),
        ]
    )


#: Elements of a matrix that share a scale in NF4.
NF4_BLOCK = 64


def nf4_sizes(rows: int, length: int) -> tuple[int, int]:
    """Return the bytes of codes of a matrix in NF4, and the number of its scales."""
    return -(-rows * length // 2), -(-rows * length // NF4_BLOCK)


def nf4_layout(d_model: int, d_ff: int) -> Layout:
    """Lay out an expert in NF4: two codes a byte, and a scale for each 64 elements (`absmax`).

    The scales are BF16 where bitsandbytes has F32: with those an expert would take more than 0.28 of its bytes in bf16.
    """
    codes, scales = nf4_sizes(d_ff, d_model)
    return Layout.of(
        part
        for name in ("wi", "wo")
        for part in ((f"{name}.weight", "U8", (codes,)), (f"{name}.absmax", "BF16", (scales,)))
    )


def layout_of(dtype: str, d_model: int, d_ff: int) -> Layout:
    """Lay out an expert in a packed dtype, `int8` or `nf4`, as bitsandbytes does."""
    if dtype == "int8":
        return int8_layout(d_model, d_ff)
    if dtype == "nf4":
        return nf4_layout(d_model, d_ff)
    raise ValueError(f"{dtype!r} is not a packed dtype")
