"""GPUs that are not there: a torch device whose memory is the CPU's, and which is stricter than any real one.

It is registered through torch's Python hooks for `PrivateUse1`, under the name `fakegpu`, once in a process, and is
available only while `fake_gpus` is on. A tensor there wraps a CPU tensor. Like a real device it has a capacity, raises
torch's out-of-memory error beyond it, and refuses operations that mix devices. Unlike a real one it is always caught:

- A `non_blocking` copy on a side stream is not made until something waits for it, so what was not waited for is
  missing or overwritten; and reading memory that such a copy has yet to write raises `RaceError`.
- Such a copy into memory that the compute stream may still be using raises `RaceError`, unless its stream has waited
  for an event that was recorded after the last use.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import backend_registration

from tests.support.fake_memory import NAME, Block, Device, RaceError

__all__ = ["GPUS", "NAME", "Device", "RaceError", "Stream", "fake_gpus"]

_COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default, torch.ops.aten._copy_from.default)


class FakeTensor(torch.Tensor):
    """A tensor of a fake GPU."""

    inner: torch.Tensor
    block: Block
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: Device | None = None, *, requires_grad: bool = False) -> Any:
        if device is None:  # accelerate makes a parameter by the class of the last one, which a wrapper keeps
            return torch.nn.Parameter(inner, requires_grad=requires_grad)
        block = device.block(inner)
        tensor: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, device.index),
        )
        tensor.inner, tensor.block = inner, block
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.to("cpu").tolist()  # torch's own refuses subclasses

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.dim() == 0 else self, spec)  # as torch does for its own class

    def __repr__(self) -> str:  # type: ignore[override]
        return f"fake({self.inner!r}, {self.device})"


class Stream:
    """The compute stream of a device, which works at once, or a side stream, which works when it is waited for."""

    def __init__(self, device: Any = None, *, compute: bool = False) -> None:
        self.fake = GPUS.devices[_index(device)]
        self.compute = compute
        self.queue: list[Callable[[], None]] = []
        self.done = 0
        self.seen = 0

    def wait_event(self, event: Event) -> None:
        event.finish()
        if event.stream is not None and event.stream.compute and event.stream.fake is self.fake:
            self.seen = max(self.seen, event.clock)

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def run_until(self, position: int) -> None:
        while self.done < position:
            self.done += 1
            self.queue[self.done - 1]()
            self.queue[self.done - 1] = lambda: None  # lets go of the tensors


class Event:
    """A point in a stream's work."""

    def __init__(self, **_: Any) -> None:
        self.stream: Stream | None = None
        self.position = self.clock = 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or GPUS.current_stream()
        self.position, self.clock = len(self.stream.queue), self.stream.fake.clock

    def finish(self) -> None:
        if self.stream is not None:
            self.stream.run_until(self.position)

    synchronize = finish


class _Module(backend_registration._DummyBackendModule):
    """What `torch.fakegpu` is: as much of `torch.cuda` as is needed."""

    Stream, Event = Stream, Event

    def __init__(self) -> None:
        self.devices: list[Device] = []
        self._compute: dict[int, Stream] = {}
        self._side: Stream | None = None

    def is_available(self) -> bool:
        return bool(self.devices)

    def device_count(self) -> int:
        return len(self.devices)

    def memory_allocated(self, device: Any = None) -> int:
        return self.devices[_index(device)].allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.devices[_index(device)].peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        fake = self.devices[_index(device)]
        fake.peak = fake.allocated

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        fake = self.devices[_index(device)]
        return fake.capacity - fake.allocated, fake.capacity

    def empty_cache(self) -> None:
        for device in self.devices:
            device.allocator.empty_cache()

    def synchronize(self, device: Any = None) -> None:
        pass

    def get_rng_state(self, device: Any) -> torch.Tensor:
        return torch.get_rng_state()  # its operations run on the CPU

    def set_rng_state(self, state: torch.Tensor, device: Any) -> None:
        torch.set_rng_state(state)

    def current_stream(self, device: Any = None) -> Stream:
        if self._side is not None and (device is None or _index(device) == self._side.fake.index):
            return self._side
        return self._compute.setdefault(_index(device), Stream(device, compute=True))

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._side = self._side, None if stream.compute else stream
        try:
            yield
        finally:
            self._side = before


class _Hook(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return GPUS.is_available()

    def is_built(self) -> bool:
        return GPUS.is_available()

    def has_primary_context(self, dev_id: int) -> bool:
        return True


GPUS = _Module()
_registered: list[Any] = []


@contextlib.contextmanager
def fake_gpus(*capacities: int | None) -> Iterator[list[Device]]:
    """Let the process have as many GPUs as capacities are given (None: unlimited), and give their states."""
    if not _registered:
        hook = _Hook()
        backend_registration._setup_privateuseone_for_python_backend(NAME, GPUS, hook)
        library = torch.library.Library("_", "IMPL")
        library.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1", with_keyset=False)
        # `torch.tensor(..., device=...)` fails in torch's own code without this one.
        aten = torch.library.Library("aten", "IMPL")
        to_copy = torch.ops.aten._to_copy.default
        aten.impl("_to_copy", lambda *args, **kwargs: _run(to_copy, args, kwargs), "PrivateUse1")
        _registered.extend([hook, library, aten])
    GPUS.devices = [Device(number) if size is None else Device(number, size) for number, size in enumerate(capacities)]
    GPUS._compute.clear()
    try:
        yield GPUS.devices
    finally:
        GPUS.devices = []


def _index(device: Any) -> int:
    if device is None:
        return 0
    index = device if isinstance(device, int) else torch.device(device).index
    return index or 0


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation on the CPU tensors within, on the device that it belongs to."""
    tensors: list[torch.Tensor] = []
    _map(lambda tensor: tensors.append(tensor) or tensor, (*args, *kwargs.values()))
    fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
    if func in _COPIES and (kwargs.get("device") is not None or len(tensors) == 2):
        return _copy(func, *args, **kwargs)
    target = kwargs.get("device")
    devices = {tensor.device for tensor in tensors if tensor.dim() or isinstance(tensor, FakeTensor)}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {found}")
    if target is not None and target.type != NAME:
        raise AssertionError(f"{func} leaves the device")
    device = fakes[0].block.device if fakes else GPUS.devices[_index(target)]
    if GPUS.current_stream(device.index).compute:
        for fake in fakes:
            fake.block.use()
    inner_kwargs = {name: "cpu" if name == "device" else _map(_inner, value) for name, value in kwargs.items()}
    result = func(*_map(_inner, args), **inner_kwargs)
    wrappers = {id(fake.inner): fake for fake in fakes}  # what is changed in place stays what it is

    def wrap(tensor: torch.Tensor) -> FakeTensor:
        return wrappers[id(tensor)] if id(tensor) in wrappers else FakeTensor(tensor, device)

    return _map(wrap, result)


def _copy(func: Any, first: Any, second: Any = None, *_: Any, **kwargs: Any) -> Any:
    """Copy between devices: `copy_(target, source)`, `_copy_from(source, target)`, or `_to_copy(source)`."""
    non_blocking = bool(kwargs.get("non_blocking"))
    if func is torch.ops.aten._to_copy.default:
        source, target = first, None
        shape = {name: kwargs[name] for name in ("dtype",) if kwargs.get(name) is not None}
        device = kwargs["device"]
        if device.type == "meta":
            return torch.empty_like(_inner(source), **shape, device="meta")
        result = torch.empty_like(_inner(source), **shape)
        target = FakeTensor(result, GPUS.devices[_index(device)]) if device.type == NAME else result
    elif func is torch.ops.aten._copy_from.default:
        source, target = first, second
    else:
        target, source = first, second
        non_blocking = non_blocking or bool(_ and _[0])
    count = target.numel() * source.element_size()
    if isinstance(source, FakeTensor) and not isinstance(target, FakeTensor):
        source.block.device.bytes_to_host += count
    elif isinstance(target, FakeTensor) and not isinstance(source, FakeTensor):
        target.block.device.bytes_to_device += count
    into, out_of = _inner(target), _inner(source)
    stream = GPUS.current_stream(target.device) if isinstance(target, FakeTensor) else None
    if stream is not None and not stream.compute:
        _defer(stream, target, lambda: into.copy_(out_of))
        if not non_blocking:
            stream.synchronize()
        return target
    for tensor in (source, target):
        if isinstance(tensor, FakeTensor):
            tensor.block.use()
    into.copy_(out_of)
    return target


def _defer(stream: Stream, target: FakeTensor, work: Callable[[], Any]) -> None:
    block = target.block
    block.be_written_later(stream.seen)

    def run() -> None:
        work()
        block.pending -= 1

    stream.queue.append(run)


def _inner(tensor: Any) -> Any:
    return tensor.inner if isinstance(tensor, FakeTensor) else tensor


def _map(change: Callable[[Any], Any], value: Any) -> Any:
    """Change every tensor among an operation's arguments or results; torch's own way takes longer than the rest."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)([_map(change, each) for each in value])
    return value
