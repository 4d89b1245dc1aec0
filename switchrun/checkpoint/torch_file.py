"""Where the tensors lie in a torch `.bin` or `.pt` file, found without torch and without running its pickle.

Since torch 1.6 such a file is a zip archive. Its entries are stored uncompressed, one for each storage, so that a
tensor is a byte range of the file; `data.pkl` says which tensor is which part of which storage.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager

from switchrun.checkpoint.files import NO_TURN, Weights
from switchrun.checkpoint.pickles import MOST_PICKLE_BYTES, ForbiddenError, Tensor, read_pickle
from switchrun.checkpoint.safetensors_file import tensor_bytes
from switchrun.checkpoint.types import MOST_HEADER_BYTES, TensorSlice
from switchrun.checkpoint.zip_offsets import ALIGNMENT, Entry, computed_offset, stated_offset
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
_END_MAGIC = b"PK\x05\x06"
_MOST_COMMENT = 0xFFFF
#: In place of a size or offset that is in the zip64 field.
_IN_ZIP64 = 0xFFFFFFFF
#: A storage takes some 100 bytes of it. Of a few bytes each, it takes 60 MiB of memory.
_MOST_DIRECTORY_BYTES = 8 << 20
_MOST_BYTE_ORDER_BYTES = 16
_MOST_ALIGNMENT_BYTES = 7
_MOST_ALIGNMENT = 1 << 20


def read_torch(file: Weights, turn: AbstractContextManager[object] = NO_TURN) -> dict[str, TensorSlice]:
    """Read which tensors a torch zip file holds, and where.

    What takes much memory is done in `turn`, such as a lock that other readers share.

    Raises:
        CorruptCheckpointError: The file is truncated, of the old format from before torch 1.6, compressed, or its
            pickle asks for anything that weights do not need.
    """
    archive = _Archive(file)
    with turn:
        tensors = _named_tensors(file, archive.data_pickle())
    return {name: archive.slice(name, tensor) for name, tensor in tensors.items()}


def read_numbers(file: Weights) -> dict[str, int]:
    """Read the whole numbers of a dictionary that is all a torch zip file holds; errors are those of `read_torch`."""
    value = _unpickled(file, _Archive(file).data_pickle())
    if type(value) is not dict:
        raise CorruptCheckpointError(f"{file.place}: the file holds no dictionary", file.remedy)
    return {name: number for name, number in value.items() if type(name) is str and type(number) is int}


def _named_tensors(file: Weights, data: bytes) -> dict[str, Tensor]:
    value = _unpickled(file, data)
    tensors = _tensors(value)
    for key in _NESTED:
        if not tensors and type(value) is dict:
            tensors = _tensors(value.get(key))
    if not tensors:
        raise CorruptCheckpointError(f"{file.place}: the file holds no named tensors")
    return tensors


def _unpickled(file: Weights, data: bytes) -> object:
    try:
        return read_pickle(data)
    except ForbiddenError as asked:
        raise CorruptCheckpointError(
            f"{file.place}: the file asks to run `{asked}` and was not loaded",
            "weights need no such thing; do not trust this file unless you know why it does",
        ) from None
    except ValueError as error:
        raise CorruptCheckpointError(f"{file.place}: its pickle is damaged: {error}", file.remedy) from error


def _tensors(value: object) -> dict[str, Tensor]:
    if type(value) is not dict:
        return {}
    return {k: v for k, v in value.items() if type(k) is str and type(v) is Tensor}


class _Archive:
    """The zip archive's entries as byte ranges of the file."""

    def __init__(self, file: Weights) -> None:
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
        self._stated: dict[bytes, int] = {}
        self._alignment = self._stated_alignment()

    def _directory(self) -> dict[bytes, Entry]:
        """Read the directory, which lies at the file's end."""
        start, length, count = self._directory_place()
        if start + length > self._file.size:
            raise self._no_directory()
        if length > _MOST_DIRECTORY_BYTES:
            raise self._corrupt(f"its zip directory would have {length} bytes")
        entries: dict[bytes, Entry] = {}
        end = start
        for entry in sorted(_entries(self._file.read(start, length)), key=lambda each: each.place, reverse=True):
            if entry.name in entries:
                raise self._corrupt("two entries of its zip directory have one name")
            entries[entry.name] = entry._replace(end=end)
            end = entry.place
        if len(entries) != count:
            raise self._no_directory()
        return entries

    def _directory_place(self) -> tuple[int, int, int]:
        """Return where the directory begins, its length, and the number of its entries."""
        # torch writes no comment, and to look for one over a network takes long.
        tail = self._tail(_END_64_PLACE.size + _END.size)
        if tail[-_END.size :][:4] != _END_MAGIC:
            tail = self._tail(_END_64_PLACE.size + _END.size + _MOST_COMMENT)
        at = tail.rfind(_END_MAGIC)
        if at < 0:
            raise self._no_directory()
        *_, count, length, start, comment = _END.unpack_from(tail, at)
        if at + _END.size + comment != len(tail):
            raise self._no_directory()
        at -= _END_64_PLACE.size
        if at >= 0 and tail[at : at + 4] == b"PK\x06\x07":
            _, _, place, _ = _END_64_PLACE.unpack_from(tail, at)
            signature, *_, count, length, start = _END_64.unpack(self._file.read(place, _END_64.size))
            if signature != b"PK\x06\x06":
                raise self._no_directory()
        return start, length, count

    def _tail(self, length: int) -> bytes:
        length = min(length, self._file.size)
        return self._file.read(self._file.size - length, length)

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
        entry = self._entry("data/" + tensor.storage)
        length = min(entry.nbytes, tensor.storage_bytes)
        offset = tensor.offset * itemsize
        if offset + nbytes > length:
            raise self._corrupt(
                f"tensor {printable(name, 200)} needs {offset + nbytes} bytes of a storage that has {length}"
            )
        start, header_bytes = self._start(entry), 0
        if not offset and nbytes and start - entry.place <= MOST_HEADER_BYTES:
            header_bytes = start - entry.place
        elif nbytes:
            start = self._stated_start(entry)  # Nobody looks at its header later.
        return TensorSlice(
            self._file.place,
            start + offset,
            nbytes,
            dtype=tensor.dtype,
            shape=tensor.shape,
            transposed=transposed,
            header_bytes=header_bytes,
            # 0 is what a writer that makes none leaves there.
            crc=entry.crc or None if nbytes and nbytes == entry.nbytes else None,
        )

    def _read(self, name: str, most_bytes: int) -> bytes:
        entry = self._entry(name)
        if entry.nbytes > most_bytes:
            raise self._corrupt(f"its entry {name} would have {entry.nbytes} bytes")
        return self._file.read(self._stated_start(entry), entry.nbytes)

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(self._root + name.encode())
        if entry is None:
            raise self._corrupt(f"the archive lacks its entry {printable(name, 200)}")
        if entry.method:
            raise self._corrupt("the archive is compressed, so that it cannot be read in place", _RESAVE)
        return entry

    def _start(self, entry: Entry) -> int:
        """Return where an entry's bytes begin, by the directory if that suffices."""
        start = computed_offset(entry, self._alignment)
        return self._stated_start(entry) if start is None else start

    def _stated_start(self, entry: Entry) -> int:
        """Return where an entry's bytes begin, by its local header."""
        if entry.name not in self._stated:
            start = stated_offset(entry, self._file.read(entry.place, entry.header_bytes))
            if start is None:
                raise self._corrupt("the archive's entries are not where its directory says")
            if start + entry.nbytes > entry.end:
                raise self._corrupt("the archive's entries overlap", self._file.remedy)
            self._stated[entry.name] = start
        return self._stated[entry.name]

    def _stated_alignment(self) -> int:
        entry = self._entries.get(self._root + b".storage_alignment")
        if entry is None or entry.method or entry.nbytes > _MOST_ALIGNMENT_BYTES:
            return ALIGNMENT
        text = self._file.read(self._stated_start(entry), entry.nbytes)
        # If the number is wrong, the computed places are, and the local headers are read.
        return int(text) if text.isdigit() and 0 < int(text) <= _MOST_ALIGNMENT else ALIGNMENT

    def _no_directory(self) -> CorruptCheckpointError:
        return self._corrupt("the file is truncated or damaged: its zip directory cannot be read", self._file.remedy)

    def _corrupt(self, problem: str, hint: str = "") -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self._file.place}: {problem}", hint)


def _entries(directory: bytes) -> Iterator[Entry]:
    """Parse the directory, whose entries are yet without an end; struct.error if it is damaged."""
    at = 0
    while at < len(directory):
        (
            signature, _, _, flags, method, _, _, crc, packed, nbytes, name_bytes, extra_bytes, comment_bytes,
            _, _, _, place,
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
        yield Entry(name, flags, method, crc, nbytes, place, 0)


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
