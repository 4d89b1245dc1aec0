"""QMoE's checkpoints: `noexp.pt` has what is no expert, `exp00.pt` and so on the experts of one sparse layer each.

The encoder's layers come first. `sizes.pt` says how many codes each matrix has. An expert consists of six tensors that
lie anywhere in their file and are of another size in each expert: switch-c-2048 has 368,640 of them, in columns here.
"""

from __future__ import annotations

import base64
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from operator import add, sub
from typing import Any

from switchrun.checkpoint.experts import Experts, gated
from switchrun.checkpoint.files import Weights
from switchrun.checkpoint.names import GATED_NAME, ROUTER_NAME, STACKS, expert_prefix, mlp_layer
from switchrun.checkpoint.torch_file import read_numbers, read_torch
from switchrun.checkpoint.types import (
    MOST_HEADER_BYTES,
    ExpertKey,
    ExpertPlaces,
    ExpertSlices,
    Index,
    Stack,
    TensorSlice,
)
from switchrun.dtypes import QMOE
from switchrun.errors import CorruptCheckpointError, printable

DENSE, SIZES = "noexp.pt", "sizes.pt"
#: What one expert takes in the index: its row in the four columns.
INDEX_BYTES_PER_EXPERT = 6 * (8 + 4 + 2 + 4)
#: Entries of a file for each expert, with two empty tensors of no use.
ENTRIES_PER_EXPERT = 8
_PART = re.compile(r"exp(\d{2}|[1-9]\d{2,3})\.pt", re.ASCII)
#: In which order the index has an expert's tensors.
_TENSORS = tuple(
    (f"{matrix}.{name}", dtype)
    for matrix in ("wi", "wo")
    for name, dtype in (("w_comp", "I16"), ("row_off", "I32"), ("ter_minmax", "BF16"))
)
_EACH = len(_TENSORS)
#: switch-c-2048 has 61,440.
_MOST_EXPERTS = 1_000_000
#: Columns of the index, as `array` calls their types: of 8, 4, 2 and 4 bytes.
_TYPES = {"offset": "Q", "nbytes": "I", "header_bytes": "H", "crc": "I"}
_REDOWNLOAD = "the checkpoint is incomplete; download it again"

Layer = tuple[Stack, int]


def is_qmoe(names: Iterable[str]) -> bool:
    """Whether a folder's files are those of such a checkpoint, even if one is missing."""
    found = set(names)
    return DENSE in found or (SIZES in found and any(map(_PART.fullmatch, found)))


def part_file(layer: int) -> str:
    """Return the name of the file with the experts of a sparse layer."""
    return f"exp{layer:02}.pt"


def weights_files(names: Iterable[str]) -> list[str]:
    """Return the files of weights among a folder's: the two that there must be, then the parts in their order."""
    parts = {int(match[1]): name for name in names if (match := _PART.fullmatch(name))}
    return [DENSE, SIZES, *(parts[number] for number in sorted(parts))]


def sparse_layers(dense: Index) -> tuple[list[Layer], int]:
    """Return the sparse layers in the order of their files, and how many experts each has: the routers know."""
    layers: set[Layer] = set()
    experts = 0
    for name in dense:
        if match := ROUTER_NAME.fullmatch(name):
            stack: Stack = "encoder" if match[1] == "encoder" else "decoder"
            if int(match[3]) == mlp_layer(stack):
                layers.add((stack, int(match[2])))
                experts = max(experts, *dense[name].shape[:1], 0)
    if len(layers) * experts > _MOST_EXPERTS:
        raise CorruptCheckpointError(f"{dense.entry}: it would have {len(layers) * experts} experts")
    return sorted(layers, key=lambda layer: (STACKS.index(layer[0]), layer[1])), experts


def read_sizes(file: Weights, layers: Sequence[Layer], experts: int) -> list[array[int]]:
    """Read how many codes each matrix has, layer by layer: `wi` and `wo` of the first expert, and so on.

    Raises:
        CorruptCheckpointError: The file is damaged, or lacks a number.
    """
    numbers = read_numbers(file)

    def of(name: str) -> int:
        size = numbers.get(name, 0)
        if not 0 < size < 1 << 31:
            shown = printable(size, 50)
            problem = f"it says {name} has {shown} codes" if name in numbers else f"it does not say how many {name} has"
            raise CorruptCheckpointError(f"{file.place}: {problem}", file.remedy)
        return size

    names = (
        (f"{expert_prefix(*layer, expert)}.{matrix}" for expert in range(experts) for matrix in ("wi", "wo"))
        for layer in layers
    )
    return [array("I", map(of, each)) for each in names]


def read_part(file: Weights, layer: Layer, sizes: Sequence[int]) -> ExpertPlaces:
    """Read where the experts of one layer lie in their file.

    Raises:
        CorruptCheckpointError: The file is damaged, or a tensor is missing or not what it must be.
        ModelError: The experts are gated.
    """
    tensors = read_torch(file)
    places = _no_places()
    for expert in range(len(sizes) // 2):
        for number, (each, dtype) in enumerate(_TENSORS):
            name = f"{expert_prefix(*layer, expert)}.{each}"
            tensor = tensors.get(name)
            if tensor is None:
                if any(map(GATED_NAME.search, tensors)):
                    raise gated(str(file.place))
                raise CorruptCheckpointError(f"{file.place}: tensor {name} is missing", _REDOWNLOAD)
            if tensor.dtype != dtype or len(tensor.shape) != 1 or tensor.nbytes >> 32:
                raise CorruptCheckpointError(
                    f"{file.place}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, not {dtype} in one dimension"
                )
            if number % 3 == 0 and tensor.shape[0] != sizes[2 * expert + number // 3]:
                raise CorruptCheckpointError(
                    f"{file.place}: tensor {name} has {tensor.shape[0]} codes; "
                    f"by sizes.pt it must have {sizes[2 * expert + number // 3]}",
                    file.remedy,
                )
            places.offset.append(tensor.offset)
            places.nbytes.append(tensor.nbytes)
            places.header_bytes.append(tensor.header_bytes)
            places.crc.append(tensor.crc or 0)
    return places


def joined(parts: Iterable[ExpertPlaces]) -> ExpertPlaces:
    """Put the layers' places one after another."""
    whole = _no_places()
    for part in parts:
        for column in _TYPES:
            getattr(whole, column).extend(getattr(part, column))
    return whole


def to_record(places: ExpertPlaces) -> dict[str, str]:
    """Return what the cached index holds of them: each column's bytes as text."""
    return {column: base64.b64encode(getattr(places, column).tobytes()).decode() for column in _TYPES}


def from_record(record: Any, dense: Index, sizes: Sequence[int]) -> ExpertPlaces:
    """Return the places of a cached index, which is not trusted; ValueError if they cannot be.

    `sizes` are those of the files with experts.
    """
    places = _no_places()
    layers, experts = sparse_layers(dense)
    each = _EACH * experts
    for column in _TYPES:
        getattr(places, column).frombytes(base64.b64decode(record[column], validate=True))
        if len(getattr(places, column)) != len(layers) * each:
            raise ValueError(column)
    if max(places.header_bytes, default=0) > MOST_HEADER_BYTES or len(sizes) < len(layers):
        raise ValueError("places")
    for layer in range(len(layers)):
        offsets = places.offset[layer * each : (layer + 1) * each]
        nbytes, headers = (column[layer * each : (layer + 1) * each] for column in (places.nbytes, places.header_bytes))
        if min(map(sub, offsets, headers)) < 0 or max(map(add, offsets, nbytes)) > sizes[layer]:
            raise ValueError("places")
    return places


def _no_places() -> ExpertPlaces:
    offset, *others = (array(kind) for kind in _TYPES.values())
    return ExpertPlaces(offset, *others)


class QmoeExperts(Experts):
    """The experts of such a checkpoint, each made when it is asked for."""

    def __init__(self, index: Index, sparse_blocks: Mapping[Stack, Sequence[int]], config: Mapping[str, Any]) -> None:
        super().__init__(index, sparse_blocks, config)
        assert index.places is not None
        self._places = index.places
        self._files = index.files[2:]
        self._layers = {layer: number for number, layer in enumerate(self._prefixes)}
        if len(self._places.nbytes) != _EACH * len(self):
            raise CorruptCheckpointError(f"{index.entry}: its tensors are not those of a QMoE checkpoint", _REDOWNLOAD)

    def __getitem__(self, key: ExpertKey) -> ExpertSlices:
        if key not in self:
            raise KeyError(key)
        stack, block, expert = key
        layer = self._layers[stack, block]
        first = _EACH * (layer * self._num_experts + expert)
        wi, wo = (self._matrix(layer, first + 3 * number, shape) for number, shape in enumerate(self._shapes.values()))
        return ExpertSlices(wi, wo)

    def _matrix(self, layer: int, at: int, shape: tuple[int, int]) -> TensorSlice:
        parts = (
            self._tensor(layer, at + 1, "I32", (shape[0] + 1,)),
            self._tensor(layer, at + 2, "BF16", (2 * shape[0],)),
        )
        return self._tensor(layer, at, QMOE, shape, parts)

    def _tensor(
        self, layer: int, at: int, dtype: str, shape: tuple[int, ...], parts: tuple[TensorSlice, ...] = ()
    ) -> TensorSlice:
        places = self._places
        return TensorSlice(
            self._files[layer], places.offset[at], places.nbytes[at], dtype, shape,
            parts=parts, header_bytes=places.header_bytes[at], crc=places.crc[at] or None,
        )  # fmt: skip

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all experts."""
        return sum(self._places.nbytes)

    def check(self) -> tuple[tuple[ExpertSlices, int], ...]:
        """Check the size of every tensor; return the largest expert, and how many experts there are."""
        for number, (rows, columns) in enumerate(self._shapes.values()):
            first = 3 * number
            # A row has one code at least, and a code stands for two weights at least.
            self._check(first, 2 * rows, 2 * rows * (columns // 2))
            self._check(first + 1, 4 * (rows + 1), 4 * (rows + 1))
            self._check(first + 2, 4 * rows, 4 * rows)
        sizes = self._places.nbytes
        whole = list(map(sum, zip(*(sizes[slot::_EACH] for slot in range(_EACH)), strict=True)))
        largest = whole.index(max(whole))
        return ((self[self._key(largest)], len(whole)),)

    def _check(self, slot: int, least: int, most: int) -> None:
        """Check the bytes of one of the tensors in each expert."""
        sizes = self._places.nbytes[slot::_EACH]
        if least <= min(sizes) and max(sizes) <= most:
            return
        number = next(number for number, size in enumerate(sizes) if not least <= size <= most)
        key = self._key(number)
        each, dtype = _TENSORS[slot]
        itemsize = 4 if dtype == "I32" else 2
        limits = f"{least // itemsize}" if least == most else f"{least // itemsize} to {most // itemsize}"
        raise CorruptCheckpointError(
            f"{self[key].wi.file}: tensor {expert_prefix(*key)}.{each} has the shape "
            f"[{sizes[number] // itemsize}]; by config.json it must be [{limits}]"
        )

    def _key(self, number: int) -> ExpertKey:
        layer, expert = divmod(number, self._num_experts)
        return ExpertKey(*list(self._prefixes)[layer], expert)
