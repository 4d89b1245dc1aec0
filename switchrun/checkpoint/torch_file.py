"""Where the tensors lie in a torch `.bin` or `.pt` file, found without torch and without running its pickle.

Since torch 1.6 such a file is a zip archive. Its entries are stored uncompressed, one for each storage, so that a
tensor is a byte range of the file; `data.pkl` says which tensor is which part of which storage. A pickle is a program:
here it is run by an unpickler that knows only what weights need, each mapped to an inert stand-in.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from switchrun.checkpoint.files import WeightsFile, open_weights, plausible
from switchrun.checkpoint.types import TensorSlice
from switchrun.dtypes import STORED_ITEMSIZE
from switchrun.errors import CorruptCheckpointError

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}  # fmt: skip
_ZIP_MAGIC = b"PK\x03\x04"
_RESAVE = "save it again in the zip format: torch.save(torch.load(path, weights_only=True), path)"
#: Keys under which training scripts nest the weights.
_NESTED = ("state_dict", "model_state_dict", "model", "module")


def read_torch(path: Path) -> dict[str, TensorSlice]:
    """Read which tensors a torch zip file holds, and where.

    Raises:
        CorruptCheckpointError: The file is truncated, of the old format from before torch 1.6, compressed, or its
            pickle asks for anything that weights do not need.
    """
    with open_weights(path) as file:
        archive = _Archive(file)
        tensors = _unpickle(path, archive.data_pickle())
        return {name: archive.slice(name, tensor) for name, tensor in tensors.items()}


class _Storage(NamedTuple):
    key: str
    dtype: str


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


# A pickle can set attributes on whatever it holds: the stand-ins have none to set, hence the empty `__slots__`.


class _StorageType(NamedTuple):
    dtype: str


class _RebuildTensor:
    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
        if not isinstance(storage, _Storage) or not plausible((offset, *shape, *stride)):
            raise pickle.UnpicklingError("a tensor is made of something other than a storage and whole numbers")
        if len(shape) != len(stride):
            raise pickle.UnpicklingError("a tensor's shape and strides differ in length")
        return _Tensor(storage, offset, tuple(shape), tuple(stride))


class _RebuildParameter:
    __slots__ = ()

    def __call__(self, data: Any, *_: Any) -> Any:
        return data


class _Ignored:
    """Stands for a dtype or layout, as a value or as what makes one."""

    __slots__ = ()

    def __call__(self, *_: Any) -> None:
        return None


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("torch.serialization", "_get_layout"): _Ignored(),
    ("torch", "Size"): tuple,
    **{("torch", name): _StorageType(dtype) for name, dtype in _STORAGES.items()},
    **{
        ("torch", name): _Ignored()
        for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    },
}


# The unpickler written in Python: the one in C can be made to take 64 GiB by a single opcode (a memo index of 32 bits).
class _Unpickler(pickle._Unpickler):
    def __init__(self, path: Path, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            # ascii(): the name is the file's, and may hold anything, control codes for the terminal too.
            asked = ascii(f"{module}.{name}"[:200])[1:-1]
            raise CorruptCheckpointError(
                f"{self._path}: the file asks to run `{asked}` and was not loaded",
                "weights need no such thing; do not trust this file unless you know why it does",
            ) from None

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, _ = pid
        if kind != "storage" or type(storage) is not _StorageType or type(key) is not str:
            raise pickle.UnpicklingError(f"unknown reference {ascii(pid)[:100]}")
        return _Storage(key, storage.dtype)


def _unpickle(path: Path, data: bytes) -> dict[str, _Tensor]:
    try:
        value = _Unpickler(path, data).load()
    except CorruptCheckpointError:
        raise
    except Exception as error:  # A damaged pickle can fail in any way at all.
        raise CorruptCheckpointError(f"{path}: its pickle is damaged: {type(error).__name__}: {error}") from error
    tensors = _tensors(value)
    for key in _NESTED:
        if not tensors and isinstance(value, Mapping):
            tensors = _tensors(value.get(key))
    if not tensors:
        raise CorruptCheckpointError(f"{path}: the file holds no named tensors")
    return tensors


def _tensors(value: object) -> dict[str, _Tensor]:
    if not isinstance(value, Mapping):
        return {}
    return {k: v for k, v in value.items() if type(k) is str and type(v) is _Tensor}


class _Archive:
    """The zip archive's entries as byte ranges of the file."""

    def __init__(self, file: WeightsFile) -> None:
        self._file = file
        self._infos = self._directory()
        pickles = [name for name in self._infos if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise self._corrupt("a zip archive, but not one that torch wrote (no data.pkl)")
        self._root = pickles[0].removesuffix("data.pkl")

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        magic = self._file.read(0, min(self._file.size, 4))
        if magic[:1] == b"\x80":
            raise self._corrupt("a torch file of the old format, which cannot be read in place", _RESAVE)
        if magic != _ZIP_MAGIC:
            raise self._corrupt("not a torch file (neither a zip archive nor a pickle)")
        try:
            with zipfile.ZipFile(self._file.file) as archive:
                # ZipFile.open is not used to read the entries, for it checks a CRC over all of each.
                return {info.filename: info for info in archive.infolist()}
        except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, EOFError, OverflowError) as error:
            problem = f"the file is truncated or damaged: its zip directory cannot be read ({error})"
            raise self._corrupt(problem, "download it again") from error

    def data_pickle(self) -> bytes:
        order = self._read("byteorder") if self._root + "byteorder" in self._infos else b"little"
        if order != b"little":
            raise self._corrupt(f"stored in {order.decode('latin-1')!a} byte order", _RESAVE)
        return self._read("data.pkl")

    def slice(self, name: str, tensor: _Tensor) -> TensorSlice:
        """Where one tensor lies in the file."""
        dtype = tensor.storage.dtype
        itemsize = STORED_ITEMSIZE[dtype]
        nbytes = math.prod(tensor.shape) * itemsize
        transposed = False
        if nbytes and not _contiguous(tensor):
            transposed = len(tensor.shape) == 2 and tensor.stride == (1, tensor.shape[0])
            if not transposed:
                raise self._corrupt(
                    f"tensor {name} {list(tensor.shape)} is stored with strides {list(tensor.stride)}",
                    "save contiguous tensors: tensor.contiguous()",
                )
        start, length = self._range("data/" + tensor.storage.key)
        offset = tensor.offset * itemsize
        if offset + nbytes > length:
            raise self._corrupt(f"tensor {name} needs {offset + nbytes} bytes of a storage that has {length}")
        place = start + offset
        return TensorSlice(self._file.path, place, nbytes, dtype=dtype, shape=tensor.shape, transposed=transposed)

    def _read(self, name: str) -> bytes:
        return self._file.read(*self._range(name))

    def _range(self, name: str) -> tuple[int, int]:
        info = self._infos.get(self._root + name)
        if info is None:
            raise self._corrupt(f"the archive lacks its entry {ascii(name)[1:-1]}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise self._corrupt("the archive is compressed, so that it cannot be read in place", _RESAVE)
        start = self._data_offset(info)
        if start + info.file_size > self._file.size:
            raise self._file.truncated("its zip directory names a place beyond its end")
        return start, info.file_size

    def _data_offset(self, info: zipfile.ZipInfo) -> int:
        # The local header's name and extra field may differ in length from the central directory's: torch pads there.
        if not 0 <= info.header_offset <= self._file.size - 30:
            raise self._file.truncated("its zip directory names a place beyond its end")
        header = self._file.read(info.header_offset, 30)
        if header[:4] != _ZIP_MAGIC:
            raise self._corrupt("the archive's entries are not where its directory says")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        return info.header_offset + 30 + int(name_bytes) + int(extra_bytes)

    def _corrupt(self, problem: str, hint: str = "") -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{self._file.path}: {problem}", hint)


def _contiguous(tensor: _Tensor) -> bool:
    expected = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        # The stride of a dimension of length 1 is never used, and torch leaves anything there.
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True
