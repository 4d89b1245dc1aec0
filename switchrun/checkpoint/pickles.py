"""Reads what the pickle of a torch file says about its tensors, without the pickle module and without running anything.

A pickle is a program for a small machine with a stack. This is such a machine for the operations that torch writes. It
makes texts, whole numbers, tuples, dictionaries and descriptions of tensors; anything else becomes one inert value.
Nothing that the file made is hashed, compared, called or printed, save texts and whole numbers.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple

from switchrun.checkpoint.files import plausible
from switchrun.checkpoint.safetensors_file import tensor_bytes
from switchrun.errors import printable

#: More than a file of 100,000 tensors takes.
MOST_PICKLE_BYTES = 64 << 20
#: A tensor takes some 35 steps. A step makes an object of 100 bytes at most, so that all take 500 MB and 5 s.
_MOST_STEPS = 5_000_000

#: torch's dtypes, as safetensors names them.
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL", "uint16": "U16", "uint32": "U32", "uint64": "U64",
    "complex64": "C64", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
_STORAGES = {
    "torch.DoubleStorage": "F64", "torch.FloatStorage": "F32", "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16", "torch.LongStorage": "I64", "torch.IntStorage": "I32", "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8", "torch.ByteStorage": "U8", "torch.BoolStorage": "BOOL",
    "torch.ComplexFloatStorage": "C64", "torch.UntypedStorage": "U8", "torch.storage.UntypedStorage": "U8",
}  # fmt: skip
_DICTIONARIES = frozenset({"collections.OrderedDict", "collections.Counter"})
_PARAMETERS = frozenset({"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"})
#: Which of a tensor's arguments there are after its storage, offset, shape and strides.
_TENSORS = {
    "torch._utils._rebuild_tensor": (),
    "torch._utils._rebuild_tensor_v2": ("grad", "hooks", "metadata"),
    "torch._utils._rebuild_tensor_v3": ("grad", "hooks", "dtype", "metadata"),
}
_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"
_SIZE = "torch.Size"
#: What torch.load(weights_only=True) knows besides, and no weight is made of.
_OTHERS = frozenset(
    {
        "_codecs.encode", "builtins.bytearray", "builtins.complex", "builtins.set", "__builtin__.bytearray",
        "__builtin__.complex", "__builtin__.set", "torch.Tensor", "torch.nn.parameter.Parameter", "torch.device",
        "torch.serialization._get_layout", "torch._utils._rebuild_meta_tensor_no_storage",
        "torch._utils._rebuild_sparse_tensor", "torch.complex128",
    }
)  # fmt: skip
_KNOWN = {*_DICTIONARIES, *_PARAMETERS, *_TENSORS, *_OTHERS, *_STORAGES, _FROM_TYPE, _SIZE}
_KNOWN.update(f"torch.{name}" for name in _DTYPES)


class ForbiddenError(Exception):
    """The pickle asks for something that weights do not need; the text is its name."""


class Tensor(NamedTuple):
    """A tensor as the pickle describes it; offset and strides count elements, and a storage is an entry of the zip."""

    storage: str
    storage_bytes: int
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Storage(NamedTuple):
    key: str
    nbytes: int
    dtype: str


class _Global:
    """Something by its name, to be called or given."""

    __slots__ = ("name",)

    def __init__(self, module: str, name: str) -> None:
        self.name = f"{module}.{name}"
        if self.name not in _KNOWN:
            raise ForbiddenError(printable(self.name, 200))


#: Stands for all that is of no interest: lists, sets, bytes, fractions, devices.
_OPAQUE = object()


def read_pickle(data: bytes) -> object:
    """Return what a pickle makes: in dictionaries, `Tensor` by names.

    Raises:
        ForbiddenError: It asks for something that weights do not need.
        ValueError: It is damaged, takes too long, or does what torch never does.
    """
    machine = _Machine(data)
    try:
        for _ in range(_MOST_STEPS):
            code = data[machine.at]
            machine.at += 1
            if code == _STOP:
                return machine.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                raise ValueError(f"operation {code:#04x} at byte {machine.at - 1} is none that torch writes")
            step(machine)
    except (LookupError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise ValueError(f"what it says before byte {machine.at} makes no sense") from error
    raise ValueError(f"it has more than {_MOST_STEPS} steps")


class _Machine:
    """The stack, what was put aside, and the place in the program."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.stack: list[object] = []
        #: The stacks below each mark.
        self.below: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.storages: dict[str, _Storage] = {}

    def number(self, length: int) -> int:
        """Read an unsigned number of so many bytes."""
        return int.from_bytes(self.take(length), "little")

    def take(self, length: int) -> bytes:
        """Read so many bytes."""
        end = self.at + length
        if end > len(self.data):
            raise ValueError("it ends too early")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def line(self) -> str:
        """Read up to the end of the line."""
        end = self.data.index(b"\n", self.at)
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[object]:
        """Take everything off the stack down to the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def push(self, value: object) -> None:
        self.stack.append(value)

    def text(self, width: int) -> None:
        self.stack.append(self.take(self.number(width)).decode())

    def bytes(self, width: int) -> None:
        self.take(self.number(width))
        self.stack.append(_OPAQUE)

    def whole(self, length: int) -> None:
        """Push a signed number of so many bytes."""
        self.stack.append(int.from_bytes(self.take(length), "little", signed=True))

    def fraction(self) -> None:
        self.take(8)
        self.stack.append(_OPAQUE)

    def tuple(self, length: int) -> None:
        items = tuple(self.stack[-length:])
        if len(items) != length:
            raise ValueError("its stack is empty")
        self.stack[-length:] = [items]

    def append(self, items: list[object]) -> None:
        """Append to a list or set, whose items are of no interest."""
        del items
        if self.stack[-1] is not _OPAQUE:
            raise ValueError("it appends to what is no list")

    def set_items(self, items: list[object]) -> None:
        """Set items of the dictionary on the stack; those whose key is no name and no number are of no interest."""
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("it sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is str or type(key) is int:
                target[key] = value

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def find_global(self) -> None:
        module = self.line()
        self.stack.append(_Global(module, self.line()))

    def find_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError("it asks for what has no name")
        self.stack.append(_Global(module, name))

    def find_instance(self) -> None:
        """Refuse the operation of old that made an instance of a class, if possible by the name of the class."""
        self.find_global()
        raise ValueError("it makes an instance of a class")

    def storage(self) -> None:
        """Replace a reference to a storage by its description."""
        reference = self.stack.pop()
        if type(reference) is not tuple or len(reference) != 5:
            raise ValueError("it refers to what is no storage")
        kind, storage, key, _, elements = reference
        dtype = _STORAGES.get(storage.name) if type(storage) is _Global else None
        if type(kind) is not str or kind != "storage" or dtype is None or type(key) is not str:
            raise ValueError("it refers to what is no storage")
        if not plausible((elements,)):
            raise ValueError("the size of a storage makes no sense")
        storage = _Storage(key, tensor_bytes(dtype, (elements,)) or 0, dtype)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError("it describes one storage in two ways")
        self.stack.append(storage)

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.stack.append(_result(function, args))

    def build(self) -> None:
        """Drop the attributes that are to be set: torch sets some of an OrderedDict, which say nothing of tensors."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise ValueError("it sets attributes of what has none")


def _result(function: object, args: object) -> object:
    """Return what stands for a function's result."""
    if type(function) is not _Global or type(args) is not tuple:
        raise ValueError("it calls what is no function")
    name = function.name
    if name == _FROM_TYPE:  # A tensor of a class of its own or with attributes: how it is made, and what is added.
        inner, _, inner_args, _ = args
        if type(inner) is not _Global or inner.name == _FROM_TYPE:
            raise ValueError("it calls what is no function")
        return _result(inner, inner_args)
    if name in _TENSORS:
        return _tensor(args, _TENSORS[name])
    if name in _PARAMETERS or name == _SIZE:
        return args[0]
    if name in _DICTIONARIES:
        return {}
    if name in _OTHERS:
        return _OPAQUE
    raise ValueError(f"it calls {name}")


def _tensor(args: tuple[object, ...], names: tuple[str, ...]) -> object:
    storage, offset, shape, stride, *others = args
    if type(storage) is not _Storage or type(shape) is not tuple or type(stride) is not tuple:
        raise ValueError("a tensor is made of something other than a storage and whole numbers")
    if not plausible((offset, *shape, *stride)) or type(offset) is not int:
        raise ValueError("a tensor is made of something other than a storage and whole numbers")
    if len(shape) != len(stride):
        raise ValueError("a tensor's shape and strides differ in length")
    more = dict(zip(names, others, strict=False))
    metadata = more.get("metadata")
    if metadata is not None and (type(metadata) is not dict or metadata):
        raise ValueError("a tensor is stored negated or conjugated")
    dtype = storage.dtype
    if "dtype" in names:
        given = more["dtype"]
        found = _DTYPES.get(given.name.removeprefix("torch.")) if type(given) is _Global else None
        if found is None:
            return _OPAQUE
        dtype = found
    return Tensor(storage.key, storage.nbytes, dtype, offset, shape, stride)


_STOP = ord(".")
_STEPS: dict[int, Callable[[_Machine], object]] = {
    code[0]: step
    for code, step in (
        (b"h", lambda m: m.push(m.memo[m.number(1)])),
        (b"q", lambda m: m.put(m.number(1))),
        (b"r", lambda m: m.put(m.number(4))),
        (b"j", lambda m: m.push(m.memo[m.number(4)])),
        (b"\x94", lambda m: m.put(len(m.memo))),
        (b"K", lambda m: m.push(m.number(1))),
        (b"M", lambda m: m.push(m.number(2))),
        (b"J", lambda m: m.whole(4)),
        (b"\x8a", lambda m: m.whole(m.number(1))),
        (b"G", _Machine.fraction),
        (b"X", lambda m: m.text(4)),
        (b"\x8c", lambda m: m.text(1)),
        (b"\x8d", lambda m: m.text(8)),
        (b"U", lambda m: m.text(1)),
        (b"T", lambda m: m.text(4)),
        (b"C", lambda m: m.bytes(1)),
        (b"B", lambda m: m.bytes(4)),
        (b"\x8e", lambda m: m.bytes(8)),
        (b"\x96", lambda m: m.bytes(8)),
        (b"(", _Machine.mark),
        (b")", lambda m: m.push(())),
        (b"t", lambda m: m.push(tuple(m.to_mark()))),
        (b"\x85", lambda m: m.tuple(1)),
        (b"\x86", lambda m: m.tuple(2)),
        (b"\x87", lambda m: m.tuple(3)),
        (b"N", lambda m: m.push(None)),
        (b"\x88", lambda m: m.push(True)),
        (b"\x89", lambda m: m.push(False)),
        (b"}", lambda m: m.push({})),
        (b"s", _Machine.set_item),
        (b"u", lambda m: m.set_items(m.to_mark())),
        (b"]", lambda m: m.push(_OPAQUE)),
        (b"\x8f", lambda m: m.push(_OPAQUE)),
        (b"a", lambda m: m.append([m.stack.pop()])),
        (b"e", lambda m: m.append(m.to_mark())),
        (b"\x90", lambda m: m.append(m.to_mark())),
        (b"\x91", lambda m: (m.to_mark(), m.push(_OPAQUE))),
        (b"c", _Machine.find_global),
        (b"\x93", _Machine.find_on_stack),
        (b"i", _Machine.find_instance),
        (b"Q", _Machine.storage),
        (b"R", _Machine.reduce),
        (b"b", _Machine.build),
        (b"\x80", lambda m: m.take(1)),
        (b"\x95", lambda m: m.take(8)),
    )
}
