"""The GPUs that torch finds, whoever made them: CUDA's first, XPU's and others as far as `torch.accelerator` has them.

Nothing here is called in a run without a GPU, so that no driver is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from switchrun.errors import UsageError
from switchrun.experts.buffers import Buffers
from switchrun.units import format_count

_log = logging.getLogger(__name__)

#: cudaHostRegisterPortable: for all GPUs.
_PORTABLE = 1


def device_type() -> str | None:
    """Return what torch calls this machine's GPUs, such as `cuda`; None if it finds none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def check_gpus(numbers: Sequence[int]) -> None:
    """Refuse GPUs that this machine does not have, or a driver that does not suit torch, and wake the others."""
    if not numbers:
        return
    _check_driver()
    there = device_count()
    for number in numbers:
        if number >= there:
            raise UsageError(
                f"gpu:{number} is asked for, and torch finds {format_count(there, 'GPU')} here",
                "give --gpu-memory 0, or change the map",
            )
        wake(number)


def _check_driver() -> None:
    """Refuse in one line a driver that CUDA does not come up with; torch warns in three, and has no GPU then."""
    if torch.version.cuda is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if torch.cuda.is_available():
            return
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"torch, built for CUDA {torch.version.cuda}, cannot use the GPU: {str(error).strip().splitlines()[0]}",
            "give --gpu-memory 0, or see switchrun doctor",
        ) from None


def device_count() -> int:
    """Return how many GPUs torch finds."""
    return 0 if device_type() is None else int(module().device_count())


def device(number: int) -> torch.device:
    """Return the device of the tier `gpu:number`."""
    return torch.device(device_type() or "cuda", number)


def wake(number: int) -> None:
    """Have the driver set up a GPU for this process, so that what this takes in CPU memory can be measured."""
    torch.zeros(1, device=device(number))


def memory_in_use(number: int) -> tuple[int, int]:
    """Return the bytes that torch has allocated on a GPU, and those that are free there for anybody."""
    free, _ = module().mem_get_info(device(number))
    return int(module().memory_allocated(device(number))), int(free)


def peak_bytes(number: int) -> int:
    """Return the most bytes that torch had allocated on a GPU."""
    return int(module().max_memory_allocated(device(number)))


def release_unused() -> None:
    """Give memory that torch keeps for later back to the driver."""
    module().empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory ran out: torch says so itself, libraries behind it in words of their own."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "ALLOC_FAILED" in text)
    )


class CopyStream:
    """A stream beside the one that computes, for copies to a GPU; its events are torch's own."""

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._stream = module().Stream(device=place)

    def computed(self) -> Any:
        """Return an event for all that the GPU was given to compute so far."""
        event = module().Event()
        event.record(module().current_stream(self._place))
        return event

    @contextlib.contextmanager
    def copying(self, after: Any) -> Iterator[None]:
        """Make the copies in the block beside computing, but after an event."""
        self._stream.wait_event(after)
        with module().stream(self._stream):
            yield

    def copied(self) -> Any:
        """Return an event for all copies so far; what is computed from now on waits for it."""
        event = module().Event()
        event.record(self._stream)
        module().current_stream(self._place).wait_event(event)
        return event

    def finish(self) -> None:
        """Block until all copies are made."""
        self._stream.synchronize()


class PageLocks:
    """Page-locks buffers, so that CUDA copies from them at full speed and beside computing; closing unlocks them.

    Each is locked when it is first copied from: locking takes all of its pages from the system, and for a large memory
    that would take longer than opening may. Other makers' GPUs copy from memory as it is.

    `place` is a GPU that is used: CUDA locks memory for all, but wakes the current one, which is the first by default.
    """

    def __init__(self, buffers: Buffers, place: torch.device) -> None:
        self._place = place
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(buffers.memory))
        self._size = buffers.size
        self._locked: set[int] = set()
        self._refused = False
        self._runtime: Any = torch.cuda.cudart() if place.type == "cuda" else None  # type: ignore[no-untyped-call]

    def lock(self, tensor: torch.Tensor) -> None:
        """Lock the buffer that a tensor begins in; blocks until its pages are there."""
        start = self._base + (tensor.data_ptr() - self._base) // self._size * self._size
        if self._runtime is None or self._refused or start in self._locked:
            return
        with torch.cuda.device(self._place):
            code = int(self._runtime.cudaHostRegister(start, self._size, _PORTABLE))
        if not code:
            self._locked.add(start)
            return
        _log.warning("memory cannot be page-locked (CUDA error %d): copies to the GPU take longer", code)
        self._refused = True
        # CUDA would report this error to whoever asks next.
        with contextlib.suppress(RuntimeError):
            wake(self._place.index)

    def close(self) -> None:
        """Unlock what is locked; nothing is being copied from it any more."""
        if not self._locked:
            return
        with torch.cuda.device(self._place):
            for start in self._locked:
                self._runtime.cudaHostUnregister(start)
        self._locked.clear()


def module() -> Any:
    """Return torch's own module for these GPUs: `torch.cuda`, `torch.xpu`; they have the same names in it."""
    return torch.get_device_module(device_type() or "cuda")
