"""Stand-ins, while transformers is imported, for parts of torch that it imports and switchrun never uses.

They are torch's compiler, `torch._dynamo`, and tensors spread over processes, `torch.distributed.tensor`; with sympy,
which comes with both, 900 modules. Without them a start takes 0.6 of 2 seconds less, and 80 MiB (transformers 5.24,
torch 2.13, 2026-11-28).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"

#: Of this module transformers imports a context manager, for masks that a Switch model does not have.
_MASKING = "torch._dynamo._trace_wrapped_higher_order_op"


class _Marks(ModuleType):
    """In the place of the compiler: decorators that tell it how to treat a function, and here leave that as it is."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _leave


def _leave(function: Callable[..., Any] | None = None, *_args: Any, **_settings: Any) -> Callable[..., Any]:
    return _leave if function is None else function


class _Later(ModuleType):
    """In the place of a module: functions that import the real one when they are called, and call that."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            return getattr(import_module(self.__name__), name)(*args, **kwargs)

        return call


@contextmanager
def stand_ins() -> Generator[None, None, None]:
    """Import without torch's compiler and distributed tensors; blocks until torch is imported.

    transformers then does without the latter for as long as the process lives, as with a torch that was built without
    them. What it has marked for the compiler is not marked: for a process that compiles nothing. Does nothing if the
    compiler is there already.
    """
    torch: Any = import_module("torch")
    if _COMPILER in sys.modules:
        yield
        return
    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    torch._dynamo = sys.modules[_COMPILER] = _Marks(_COMPILER)
    sys.modules[_MASKING] = _Later(_MASKING)
    try:
        yield
    finally:
        torch.distributed.is_available = is_available
        del torch._dynamo, sys.modules[_COMPILER], sys.modules[_MASKING]
