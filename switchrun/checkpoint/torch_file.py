"""Where the tensors lie in a torch `.bin` or `.pt` file, found without torch and without running its pickle.

Since torch 1.6 such a file is a zip archive. Its entries are stored uncompressed, one for each storage, so that a
tensor is a byte range of the file; `data.pkl` says which tensor is which part of which storage.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from switchrun.checkpoint.files import NO_TURN, WeightsFile, open_weights
from switchrun.checkpoint.pickles import MOST_PICKLE_BYTES, ForbiddenError, Tensor, read_pickle
from switchrun.checkpoint.safetensors_file import tensor_bytes
from switchrun.checkpoint.types import TensorSlice
from switchrun.errors import CorruptCheckpointError, printable

ZIP_MAGIC = b"PK\x03\x04"
_RESAVE = "save it again in the zip format: torch.save(torch.load(path, weights_only=True), path)"
#: Keys under which training scripts nest the weights.
_NESTED = ("state_dict", "model_state_dict", "model", "module")

# The records of the zip format, https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, sections 4.3 and 4.5.
_END = struct.Struct("<4s4H2LH")
_END_64_PLACE = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_MOST_COMMENT = 0xFFFF
#: In place of a size or offset that is in the zip64 field.
_IN_ZIP64 = 0xFFFFFFFF
#: A storage takes some 100 bytes of it. Of a few bytes each, it takes 60 MiB of memory.
_MOST_DIRECTORY_BYTES = 8 << 20
_MOST_BYTE_ORDER_BYTES = 16


def read_torch(path: Path, turn: AbstractContextManager[object] = NO_TURN) -> dict[str, TensorSlice]:
    """Read which tensors a torch zip file holds, and where.

    What takes much memory is done in `turn`, such as a lock that other readers share.

    Raises:
        CorruptCheckpointError: The file is truncated, of the old format from before torch 1.6, compressed, or its
            pickle asks for anything that weights do not need.
    """
    with open_weights(path) as file:
        archive = _Archive(file)
        with turn:
            tensors = _named_tensors(path, archive.data_pickle())
        return {name: archive.slice(name, tensor) for name, tensor in tensors.items()}


def _named_tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        value = read_pickle(data)
    except ForbiddenError as asked:
        raise CorruptCheckpointError(
            f"{path}: the file asks to run `{asked}` and was not loaded",
            "weights need no such thing; do not trust this file unless you know why it does",
        ) from None
    except ValueError as error:
        raise CorruptCheckpointError(f"{path}: its pickle is damaged: {error}", "download it again") from error
    tensors = _tensors(value)
    for key in _NESTED:
        if not tensors and type(value) is dict:
            tensors = _tensors(value.get(key))
    if not tensors:
        raise CorruptCheckpointError(f"{path}: the file holds no named tensors")
    return tensors


def _tensors(value: object) -> dict[str, Tensor]:
    if type(value) is not dict:
        return {}
    return {k: v for k, v in value.items() if type(k) is str and type(v) is Tensor}


class _Entry(NamedTuple):
    """What the directory says of an entry; `end` is where the next one begins."""

    method: int
    nbytes: int
    place: int
    end: int


class _Archive:
    """The zip archive's entries as byte ranges of the file."""

    def __init__(self, file: WeightsFile) -> None:
        self._file = file
        magic = file.read(0, min(file.size, len(ZIP_MAGIC)))
        if magic[:1] == b"\x80":
            raise self._corrupt("a torch file of the old format, which cannot be read in place", _RESAVE)
        if magic != ZIP_MAGIC:
            raise self._corrupt("not a torch file (neither a zip archive nor a pickle)")
        try:
            self._entries = self._directory()
        except struct.error as error:
            raise self._no_directory() from error
        pickles = [name for name in self._entries if name.endswith(b"/data.pkl") and name.count(b"/") == 1]
        if len(pickles) != 1:
            raise self._corrupt("a zip archive, but not one that torch wrote (no data.pkl)")
        self._root = pickles[0].removesuffix(b"data.pkl")

    def _directory(self) -> dict[bytes, _Entry]:
        """Read the directory, which lies at the file's end."""
        start, length, count = self._directory_place()
        if start + length > self._file.size:
            raise self._no_directory()
        if length > _MOST_DIRECTORY_BYTES:
            raise self._corrupt(f"its zip directory would have {length} bytes")
        entries: dict[bytes, _Entry] = {}
        end = start
        for name, entry in sorted(
            _entries(self._file.read(start, length)), key=lambda item: item[1].place, reverse=True
        ):
            if name in entries:
                raise self._corrupt("two entries of its zip directory have one name")
            entries[name] = entry._replace(end=end)
            end = entry.place
        if len(entries) != count:
            raise self._no_directory()
        return entries

    def _directory_place(self) -> tuple[int, int, int]:
        """Return where the directory begins, its length, and the number of its entries."""
        tail_bytes = min(self._file.size, _END_64_PLACE.size + _END.size + _MOST_COMMENT)
        tail = self._file.read(self._file.size - tail_bytes, tail_bytes)
        at = tail.rfind(b"PK\x05\x06")
        if at < 0:
            raise self._no_directory()
        *_, count, length, start, comment = _END.unpack_from(tail, at)
        if at + _END.size + comment != tail_bytes:
            raise self._no_directory()
        at -= _END_64_PLACE.size
        if at >= 0 and tail[at : at + 4] == b"PK\x06\x07":
            _, _, place, _ = _END_64_PLACE.unpack_from(tail, at)
            signature, *_, count, length, start = _END_64.unpack(self._file.read(place, _END_64.size))
            if signature != b"PK\x06\x06":
                raise self._no_directory()
        return start, length, count

    def data_pickle(self) -> bytes:
        if self._root + b"byteorder" in self._entries:
            order = self._read("byteorder", _MOST_BYTE_ORDER_BYTES)
            if order != b"little":
                raise self._corrupt(f"stored in '{order.decode('latin-1')}' byte order", _RESAVE)
        return self._read("data.pkl", MOST_PICKLE_BYTES)

    def slice(self, name: str, tensor: Tensor) -> TensorSlice:
        """Where one tensor lies in the file."""
        nbytes, itemsize = tensor_bytes(tensor.dtype, tensor.shape), tensor_bytes(tensor.dtype, (1,))
        if nbytes is None or itemsize is None:
            raise self._corrupt(f"tensor {printable(name, 200)} {list(tensor.shape)} is larger than any file")
        transposed = False
        if nbytes and not _contiguous(tensor):
            transposed = len(tensor.shape) == 2 and tensor.stride == (1, tensor.shape[0])
            if not transposed:
                raise self._corrupt(
                    f"tensor {printable(name, 200)} {list(tensor.shape)} is stored with strides {list(tensor.stride)}",
                    "save contiguous tensors: tensor.contiguous()",
                )
        start, length = self._range("data/" + tensor.storage)
        length = min(length, tensor.storage_bytes)
        offset = tensor.offset * itemsize
        if offset + nbytes > length:
            raise self._corrupt(
                f"tensor {printable(name, 200)} needs {offset + nbytes} bytes of a storage that has {length}"
            )
        place = start + offset
        return TensorSlice(
            self._file.path, place, nbytes, dtype=tensor.dtype, shape=tensor.shape, transposed=transposed
        )

    def _read(self, name: str, most_bytes: int) -> bytes:
        start, length = self._range(name)
        if length > most_bytes:
            raise self._corrupt(f"its entry {name} would have {length} bytes")
        return self._file.read(start, length)

    def _range(self, name: str) -> tuple[int, int]:
        """Return where an entry's bytes begin and how many there are."""
        full = self._root + name.encode()
        entry = self._entries.get(full)
        if entry is None:
            raise self._corrupt(f"the archive lacks its entry {printable(name, 200)}")
        if entry.method:
            raise self._corrupt("the archive is compressed, so that it cannot be read in place", _RESAVE)
        # The local header's extra field may differ in length from the directory's: torch pads there.
        header = self._file.read(entry.place, _LOCAL.size + len(full))
        signature, *_, name_bytes, extra_bytes = _LOCAL.unpack_from(header)
        if signature != ZIP_MAGIC or name_bytes != len(full) or not header.endswith(full):
            raise self._corrupt("the archive's entries are not where its directory says")
        start = entry.place + len(header) + extra_bytes
        if start + entry.nbytes > entry.end:
            raise self._corrupt("the archive's entries overlap", "download it again")
        return start, entry.nbytes

    def _no_directory(self) -> CorruptCheckpointError:
        return self._corrupt("the file is truncated or damaged: its zip directory cannot be read", "download it again")

    def _corrupt(self, problem: str, hint: str = "") -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self._file.path}: {problem}", hint)


def _entries(directory: bytes) -> Iterator[tuple[bytes, _Entry]]:
    """Parse the directory; struct.error if it is damaged."""
    at = 0
    while at < len(directory):
        (
            signature, _, _, _, method, _, _, _, packed, nbytes, name_bytes, extra_bytes, comment_bytes, _, _, _, place,
        ) = _ENTRY.unpack_from(directory, at)  # fmt: skip
        at += _ENTRY.size
        name = directory[at : at + name_bytes]
        extra = directory[at + name_bytes : at + name_bytes + extra_bytes]
        at += name_bytes + extra_bytes + comment_bytes
        if signature != b"PK\x01\x02" or at > len(directory):
            raise struct.error
        nbytes, packed, place = _wide((nbytes, packed, place), extra)
        if not method and packed != nbytes:
            raise struct.error
        yield name, _Entry(method, nbytes, place, 0)


def _wide(numbers: tuple[int, ...], extra: bytes) -> Iterator[int]:
    """Yield sizes and offset of an entry, those that are too large for the directory from the extra field."""
    at = 0
    while _IN_ZIP64 in numbers:
        kind, length = struct.unpack_from("<2H", extra, at)
        at += 4
        if kind == 1:
            break
        at += length
    for number in numbers:
        if number == _IN_ZIP64:
            (number,) = struct.unpack_from("<Q", extra, at)
            at += 8
        yield number


def _contiguous(tensor: Tensor) -> bool:
    expected = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        # The stride of a dimension of length 1 is never used, and torch leaves anything there.
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
