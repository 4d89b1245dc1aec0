"""The GPUs that torch finds, whoever made them: CUDA's first, XPU's and others as far as `torch.accelerator` has them.

Nothing here is called in a run without a GPU, so that no driver is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Iterator
from mmap import mmap
from typing import Any

import torch

_log = logging.getLogger(__name__)


def device_type() -> str | None:
    """Give what torch calls this machine's GPUs, such as `cuda`; None if it finds none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def device_count() -> int:
    """Give how many GPUs torch finds."""
    return 0 if device_type() is None else int(_module().device_count())


def device(number: int) -> torch.device:
    """Give the device of the tier `gpu:number`."""
    return torch.device(device_type() or "cuda", number)


def memory_in_use(number: int) -> tuple[int, int]:
    """Give the bytes that torch has allocated on a GPU, and those that are free there for anybody."""
    free, _ = _module().mem_get_info(device(number))
    return int(_module().memory_allocated(device(number))), int(free)


def peak_bytes(number: int) -> int:
    """Give the most bytes that torch had allocated on a GPU."""
    return int(_module().max_memory_allocated(device(number)))


def release_unused() -> None:
    """Give memory that torch keeps for later back to the driver."""
    _module().empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a GPU's memory ran out: torch says so itself, libraries behind it in words of their own."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "ALLOC_FAILED" in text)
    )


class CopyStream:
    """A stream beside the one that computes, for copies to a GPU; the names of its events are torch's own.

    Args:
        place: The GPU.
    """

    def __init__(self, place: torch.device) -> None:
        self._place = place
        self._stream = _module().Stream(device=place)

    def computed(self) -> Any:
        """Give an event for all that has been given to the GPU to compute so far."""
        event = _module().Event()
        event.record(_module().current_stream(self._place))
        return event

    @contextlib.contextmanager
    def copying(self, after: Any) -> Iterator[None]:
        """Let the copies in the block be made beside computing, but after an event."""
        self._stream.wait_event(after)
        with _module().stream(self._stream):
            yield

    def copied(self) -> Any:
        """Give an event for all copies so far, and let what is computed from now on wait for it."""
        event = _module().Event()
        event.record(self._stream)
        _module().current_stream(self._place).wait_event(event)
        return event

    def finish(self) -> None:
        """Block until all copies are made."""
        self._stream.synchronize()


@contextlib.contextmanager
def page_locked(memory: mmap) -> Iterator[None]:
    """Keep a mapping page-locked, so that CUDA copies from it at full speed and beside computing.

    All of its pages are taken from the system now. Other makers' GPUs, and systems that refuse, copy from it as it is.
    """
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    runtime = torch.cuda.cudart() if device_type() == "cuda" else None
    locked = False
    if runtime is not None:
        code = int(runtime.cudaHostRegister(address, len(memory), 0))
        locked = code == 0
        if not locked:
            _log.warning("memory cannot be page-locked (CUDA error %d): copies to the GPU take longer", code)
    try:
        yield
    finally:
        if locked:
            runtime.cudaHostUnregister(address)


def _module() -> Any:
    """torch's own module for these GPUs: `torch.cuda`, `torch.xpu`; they have the same names in it."""
    return torch.get_device_module(device_type() or "cuda")
