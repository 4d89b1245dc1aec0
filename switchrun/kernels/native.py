"""Products in C: bf16, int8, nf4 and qmoe matrices that are unpacked in registers, on a few threads of our own.

`libraries` knows which of a processor's paths is used. ctypes lets go of the interpreter's lock while C runs. Every sum
is in float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch

from switchrun.kernels.libraries import PATHS as PATHS
from switchrun.kernels.libraries import library
from switchrun.kernels.libraries import path as path
from switchrun.kernels.libraries import paths as paths
from switchrun.store.layout import nf4_sizes

#: Threads that may work on one product, the caller's among them.
MOST_THREADS = 8
#: A thread gets at least so many elements: starting one takes some 20 µs.
_SHARE = 1 << 18
_PANEL = 4  # native.h's: shares begin at a multiple of it

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_PRODUCT = [_POINTER, _INT, _INT, _POINTER, _INT, _INT, _INT]
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "bf16_product": (None, [*_PRODUCT, _POINTER]),
    "int8_product": (None, [*_PRODUCT, _POINTER, _POINTER]),
    "nf4_product": (None, [*_PRODUCT, _POINTER, _POINTER]),
    "nf4_unpack": (None, [_POINTER, *[_INT] * 3, _POINTER, _POINTER]),
    "nf4_quantise": (None, [_POINTER, _INT, _POINTER, _POINTER]),
    "qmoe_lanes": (_INT, []),
    "qmoe_beside": (_INT, [_POINTER, *[_INT] * 3, _POINTER]),
    "qmoe_product": (
        _INT,
        [_POINTER, *[_INT] * 3, _POINTER, *[_INT] * 3, _POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER],
    ),
    "qmoe_unpack": (_INT, [_POINTER, *[_INT] * 3, _POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER]),
    "qmoe_dictionary": (_INT, [_POINTER] * 3),
    "qmoe_encode": (_INT, [_POINTER, _INT, _INT, _POINTER, _POINTER, _POINTER]),
}
#: Codewords of QMoE's dictionary.
QMOE_WORDS = 1 << 16
_WRONG = {1: "offsets that do not rise", 2: "a code beyond the dictionary", 3: "codes that do not fill it"}


class DamagedMatrixError(ValueError):
    """A QMoE matrix whose codes or offsets cannot be; nothing outside it was read."""


def damaged(row: int, wrong: int) -> DamagedMatrixError:
    """The error to raise for a row: 1 is wrong with its offsets, 2 with a code, 3 with its length, as in c/qmoe.c."""
    return DamagedMatrixError(f"row {row} has {_WRONG[wrong]}")


@dataclass(frozen=True, slots=True)
class Dictionary:
    """QMoE's codewords: `table` decodes them, `next` encodes, `pairs` spells them (see c/qmoe_dictionary.c)."""

    table: torch.Tensor
    next: torch.Tensor
    pairs: torch.Tensor


def available() -> bool:
    """Return whether there is a path to use."""
    return path() is not None


def linear_bf16(x: torch.Tensor, weight: torch.Tensor, threads: int | None = None) -> torch.Tensor:
    """Return `x @ weight.T` in float32; `x` `[tokens, in]`, `weight` bfloat16 `[out, in]`."""
    _check("weight", weight, (torch.bfloat16,), (weight.shape[0], x.shape[-1]))
    return _product("bf16_product", x, (weight.shape[0], weight.shape[1]), threads, weight)


def linear_int8(x: torch.Tensor, codes: torch.Tensor, scb: torch.Tensor, threads: int | None = None) -> torch.Tensor:
    """Return `x @ weight.T` in float32; the matrix as `quantise_int8` writes it."""
    _check("codes", codes, (torch.int8,), (codes.shape[0], x.shape[-1]))
    _check("SCB", scb, (torch.float32,), (codes.shape[0],))
    return _product("int8_product", x, (codes.shape[0], codes.shape[1]), threads, codes, scb / 127.0)


def linear_nf4(
    x: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], threads: int | None = None
) -> torch.Tensor:
    """Return `x @ weight.T` in float32; a matrix `(out, in)` in bitsandbytes' plain layout, `absmax` bfloat16."""
    _check_nf4(packed, absmax, shape, torch.bfloat16)
    return _product("nf4_product", x, shape, threads, packed, absmax)


def unpack_nf4(
    packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], rows: slice, result: torch.Tensor
) -> None:
    """Write some rows of a matrix as `linear_nf4` takes it to a tensor in float32 or bfloat16."""
    _check_nf4(packed, absmax, shape, torch.bfloat16)
    if not 0 <= rows.start <= rows.stop <= shape[0]:
        raise ValueError(f"a matrix of {shape[0]} rows has no rows {rows.start} to {rows.stop}")
    count, columns, function = rows.stop - rows.start, shape[1], _loaded().nf4_unpack
    _check("the result", result, (torch.float32, torch.bfloat16), (count, columns))
    dtype, to, codes, scales = result.dtype, result.data_ptr(), packed.data_ptr(), absmax.data_ptr()

    def share(begin: int, end: int) -> None:
        at = to + begin * columns * dtype.itemsize
        function(at, dtype is torch.bfloat16, (rows.start + begin) * columns, (end - begin) * columns, codes, scales)

    _split(count, columns, None, share)


def quantise_nf4(values: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> None:
    """Quantise float32 values, flat, of which each 64 are a block; `absmax` is float32. Works on this thread."""
    _check("values", values, (torch.float32,), (len(values),))
    _check_nf4(packed, absmax, (1, len(values)), torch.float32)
    _loaded().nf4_quantise(values.data_ptr(), len(values), packed.data_ptr(), absmax.data_ptr())


def linear_qmoe(
    x: torch.Tensor, codes: torch.Tensor, offsets: torch.Tensor, extremes: torch.Tensor, threads: int | None = None
) -> torch.Tensor:
    """Return `x @ weight.T` in float32; a `DamagedMatrixError` names the row that cannot be decoded.

    The matrix is as `qmoe.QmoeMatrix` has it.
    """
    library, table = _loaded(), dictionary().table
    (tokens, columns), rows = x.shape, len(offsets) - 1
    _check("x", x, (x.dtype,), (tokens, columns), contiguous=False)
    _check_qmoe(codes, offsets, extremes)
    x = x.float().contiguous()
    lanes = library.qmoe_lanes()
    stride = 1 if tokens == 1 else -(-tokens // lanes) * lanes
    given, y = torch.empty(columns, stride), torch.empty(tokens, rows)
    # In C, as torch's threads would go on waiting for work on the cores that ours need.
    if not library.qmoe_beside(x.data_ptr(), tokens, columns, stride, given.data_ptr()):
        step = max(1, _SHARE // max(1, columns))  # of 1.5 MiB: as a whole, a matrix may take 77
        block = torch.empty(min(step, rows), columns, dtype=torch.bfloat16)
        for begin in range(0, rows, step):
            end = min(begin + step, rows)
            weight = block[: end - begin]
            unpack_qmoe(codes, offsets, extremes, weight, begin, end)
            y[:, begin:end] = torch.nn.functional.linear(x, weight.float())
        return y
    held = (given, y, table, codes, offsets, extremes)
    at = [tensor.data_ptr() for tensor in held]

    def share(begin: int, end: int) -> None:
        _fine(
            library.qmoe_product(
                at[0], tokens, columns, stride, at[1], rows, begin, end, at[2], QMOE_WORDS, at[3], len(codes),
                *at[4:],
            )
        )  # fmt: skip

    _split(rows, columns, threads, share)
    return y


def unpack_qmoe(
    codes: torch.Tensor, offsets: torch.Tensor, extremes: torch.Tensor, result: torch.Tensor, begin: int, end: int
) -> None:
    """Write rows `begin` to `end` to a bfloat16 tensor `[end - begin, in]`; a `DamagedMatrixError` names a bad one."""
    _check_qmoe(codes, offsets, extremes)
    table = dictionary().table
    columns = result.shape[1]
    _check("the result", result, (torch.bfloat16,), (end - begin, columns))
    held = (result, table, codes, offsets, extremes)
    at = [tensor.data_ptr() for tensor in held]

    def share(first: int, last: int) -> None:
        where = at[0] + 2 * columns * first
        _fine(
            _loaded().qmoe_unpack(
                where, columns, begin + first, begin + last, at[1], QMOE_WORDS, at[2], len(codes), *at[3:]
            )
        )

    _split(end - begin, columns, None, share)


def encode_qmoe(digits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode digits, uint8 `[rows, in]` (0, 1 or 2), by the longest match; return codes and where each row's begin."""
    rows, columns = digits.shape
    _check("digits", digits, (torch.uint8,), (rows, columns))
    if columns % 2:
        raise ValueError(f"QMoE encodes pairs, and a row has {columns} digits")
    codes, offsets = torch.empty(rows * columns // 2, dtype=torch.int16), torch.empty(rows + 1, dtype=torch.int32)
    following = dictionary().next
    count = _loaded().qmoe_encode(
        digits.data_ptr(), rows, columns, following.data_ptr(), codes.data_ptr(), offsets.data_ptr()
    )
    if count < 0:
        raise ValueError("digits are 0, 1 and 2")
    return codes[:count].clone(), offsets


def _check_nf4(packed: torch.Tensor, absmax: torch.Tensor, shape: tuple[int, int], scales: torch.dtype) -> None:
    codes, blocks = nf4_sizes(*shape)
    _check("codes", packed, (torch.uint8,), (codes,))
    _check("absmax", absmax, (scales,), (blocks,))


def _check_qmoe(codes: torch.Tensor, offsets: torch.Tensor, extremes: torch.Tensor) -> None:
    _check("codes", codes, (torch.int16,), (len(codes),))
    _check("row offsets", offsets, (torch.int32,), (len(offsets),))
    _check("row extremes", extremes, (torch.bfloat16,), (2 * (len(offsets) - 1),))


@cache
def dictionary() -> Dictionary:
    """Build QMoE's dictionary, once in a process."""
    made = Dictionary(
        torch.empty(QMOE_WORDS, dtype=torch.uint32),
        torch.empty(QMOE_WORDS + 1, 9, dtype=torch.int32),
        torch.empty(QMOE_WORDS, dtype=torch.uint64),
    )
    error = _loaded().qmoe_dictionary(made.table.data_ptr(), made.pairs.data_ptr(), made.next.data_ptr())
    if error:
        raise MemoryError("no memory to build QMoE's dictionary")
    return made


def _product(
    name: str, x: torch.Tensor, shape: tuple[int, int], threads: int | None, *parts: torch.Tensor
) -> torch.Tensor:
    rows, columns = shape
    tokens = x.shape[0]
    _check("x", x, (x.dtype,), (tokens, columns), contiguous=False)
    function, x, y = getattr(_loaded(), name), x.float().contiguous(), torch.empty(tokens, rows)
    given, result, rest = x.data_ptr(), y.data_ptr(), [part.data_ptr() for part in parts]

    def share(begin: int, end: int) -> None:
        function(given, tokens, columns, result, rows, begin, end, *rest)

    _split(rows, columns, threads, share)
    return y


def _split(rows: int, columns: int, threads: int | None, share: Callable[[int, int], None]) -> None:
    """Call `share` for ranges of rows, one of them on this thread; what any of them raises is raised here."""
    most = min(MOST_THREADS, torch.get_num_threads() if threads is None else threads)
    parts = max(1, min(most, rows * columns // _SHARE))
    step = max(_PANEL, -(-rows // (parts * _PANEL)) * _PANEL)
    starts = range(0, rows, step)
    others: list[Future[None]] = [_helpers().submit(share, at, min(at + step, rows)) for at in starts[1:]]
    try:
        if rows:
            share(0, min(step, rows))
    finally:  # whatever happens here, they write into the result
        errors = [other.exception() for other in others]
    for error in errors:
        if error is not None:
            raise error


def _fine(code: int) -> None:
    if code:
        raise damaged(code // 4, code % 4)


def _check(
    name: str, tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], contiguous: bool = True
) -> None:
    if tensor.dtype not in dtypes or tensor.shape != shape:
        wanted = f"{dtypes[0]} {list(shape)}"
        raise ValueError(f"{name} must be {wanted}, not {tensor.dtype} {list(tensor.shape)}")
    if tensor.device.type != "cpu" or (contiguous and not tensor.is_contiguous()):
        raise ValueError(f"{name} must be on the CPU and contiguous")


def _loaded() -> ctypes.CDLL:
    chosen = path()
    if chosen is None:
        raise RuntimeError("switchrun was built without its kernels")
    return _declared(chosen)


@cache
def _declared(path: str) -> ctypes.CDLL:
    loaded = library(path)
    assert loaded is not None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MOST_THREADS - 1, thread_name_prefix="switchrun-product")
