"""Writes what `torch.save` writes, tensor by tensor: little memory, right checksums, and holes where asked for."""

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from switchrun.dtypes import STORED_ITEMSIZE

#: Where torch begins a storage, and what it pads the local header with.
_ALIGNMENT, _PADDING = 64, b"FB"
#: An offset from here on stands in an extra field of 64 bits.
_ZIP64_FROM = 0xFFFFFFFF
_STORAGES = {"BF16": "BFloat16Storage", "I16": "ShortStorage", "I32": "IntStorage"}
_Pieces = Iterable[bytes | memoryview]


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """A tensor to write, less than 4 GiB of it; `pieces` gives its bytes when it is their turn, None is a hole.

    Under several names in one file, it is stored once.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], _Pieces] | None

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return STORED_ITEMSIZE[self.dtype] * self.count

    @property
    def count(self) -> int:
        """Its elements."""
        return math.prod(self.shape)


def write_torch_zip(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """Write a file that `torch.load` opens, with a dictionary of these tensors."""
    storages = list(dict.fromkeys(tensors.values()))  # by identity
    with open(path, "wb") as file:
        archive = _Archive(file, path.stem)
        archive.add("data.pkl", [_pickled(tensors, {id(each): str(key) for key, each in enumerate(storages)})])
        archive.add("byteorder", [b"little"])
        for key, stored in enumerate(storages):
            archive.add(f"data/{key}", stored.pieces() if stored.pieces else stored.nbytes)
        archive.add("version", [b"3\n"])
        archive.end()


def _pickled(tensors: Mapping[str, StoredTensor], keys: Mapping[int, str]) -> bytes:
    import torch

    class Storage:
        def __init__(self, stored: StoredTensor) -> None:
            kind = getattr(torch, _STORAGES[stored.dtype])
            self.key = ("storage", kind, keys[id(stored)], "cpu", stored.count)

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return value.key if isinstance(value, Storage) else None

        def reducer_override(self, value: Any) -> Any:
            if not isinstance(value, StoredTensor):
                return NotImplemented
            strides = tuple(math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape)))
            hooks: OrderedDict[str, Any] = OrderedDict()
            return torch._utils._rebuild_tensor_v2, (Storage(value), 0, value.shape, strides, False, hooks)

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(dict(tensors))
    return buffer.getvalue()


class _Archive:
    """A zip whose entries are stored, laid out as torch's writer does it; checkpoint/zip_offsets.py reads that."""

    def __init__(self, file: BinaryIO, root: str) -> None:
        self._file, self._root = file, root
        self._entries: list[bytes] = []

    def add(self, name: str, data: _Pieces | int) -> None:
        """Add an entry: its data in pieces, or so many bytes of a hole."""
        path, place = f"{self._root}/{name}".encode(), self._file.tell()
        wide = struct.pack("<2HQ", 1, 8, place) if place >= _ZIP64_FROM else b""
        start = place + 30 + len(path) + len(wide) + 4
        padding = -start % _ALIGNMENT
        extra = wide + struct.pack("<2sH", _PADDING, padding) + b"Z" * padding
        kind = struct.pack("<5H", 0, 0x0808, 0, 0, 0)  # the sizes follow the data; names in UTF-8
        self._file.write(b"PK\x03\x04" + kind + struct.pack("<3L2H", 0, 0, 0, len(path), len(extra)) + path + extra)
        crc = nbytes = 0
        if isinstance(data, int):
            crc, nbytes = _zeros_crc(data), data
            self._file.seek(nbytes, io.SEEK_CUR)
        else:
            for piece in data:
                crc, nbytes = zlib.crc32(piece, crc), nbytes + self._file.write(piece)
        self._file.write(struct.pack("<4sL2Q" if wide else "<4s3L", b"PK\x07\x08", crc, nbytes, nbytes))
        sizes = struct.pack("<3L3H", crc, nbytes, nbytes, len(path), len(wide), 0)
        rest = struct.pack("<2H2L", 0, 0, 0, min(place, _ZIP64_FROM))
        self._entries.append(b"PK\x01\x02" + struct.pack("<H", 0) + kind + sizes + rest + path + wide)

    def end(self) -> None:
        """Write the directory."""
        start, count = self._file.tell(), len(self._entries)
        self._file.writelines(self._entries)
        length = (end := self._file.tell()) - start
        self._file.write(struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, length, start))
        self._file.write(struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1))
        few, near = min(count, 0xFFFF), min(start, _ZIP64_FROM)
        self._file.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, few, few, length, near, 0))


@cache
def _zeros_crc(nbytes: int) -> int:
    crc, block = 0, bytes(1 << 20)
    for _ in range(nbytes >> 20):
        crc = zlib.crc32(block, crc)
    return zlib.crc32(block[: nbytes & (1 << 20) - 1], crc)
