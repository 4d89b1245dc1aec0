"""What the command line does to its own process before torch is there; a library must not do so to its host.

Stand-ins take the place of parts of torch that transformers imports and switchrun never uses: torch's compiler,
`torch._dynamo`, and tensors spread over processes, `torch.distributed.tensor`; with sympy, which comes with both, 900
modules. Without them a start takes 0.6 of 2 seconds less, and 80 MiB (transformers 5.24, torch 2.13, 2026-11-28).
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from switchrun.cli.signals import SIGNALS
from switchrun.units import MIB

if TYPE_CHECKING:
    from switchrun.planning import Plan

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
_COMPILER = "torch._dynamo"
#: Of this module transformers imports a context manager, for masks that a Switch model does not have.
_MASKING = "torch._dynamo._trace_wrapped_higher_order_op"
#: What the model needs of other people's libraries: all that could miss what the stand-ins stand for.
_LIBRARIES = (
    "transformers.activations",
    "transformers.initialization",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.switch_transformers.modeling_switch_transformers",
    "accelerate.hooks",
    "accelerate.utils",
)
#: glibc's names for: pieces from this size on are memory of their own, so much free memory at the end is kept, and so
#: many heaps there may be.
_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_ARENA_MAX = -3, -1, -8


def debugging() -> bool:
    """Whether `SWITCHRUN_DEBUG` asks for tracebacks and for what the libraries say."""
    return os.environ.get("SWITCHRUN_DEBUG", "0") not in ("", "0")


def let_threads_sleep() -> None:
    """Have torch's threads sleep when they have nothing to do; call it before torch is imported.

    They would go on turning for 10 ms after each product, on the cores that ours (`kernels/native`) need: on two of
    them a loop of both took 1.4 times as long for 8 rows (7.0 and 9.8 ms), and 3 times and more beside other programs.
    For a single row at rest it was 0.8 times (5.8 and 4.4 ms).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def share_one_heap() -> None:
    """Have all threads take memory from one heap, where what one has freed serves the others; call it before any runs.

    With a heap for each, as glibc has it, a fill that packs experts on their way took 792 to 852 MiB, and once 901,
    more than its budget of 878. With one heap it took 730 to 769.
    """
    _mallopt(_M_ARENA_MAX, 1)


def _mallopt(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        mallopt(option, value)


def quieten_libraries() -> None:
    """Silence torch, transformers and huggingface_hub; call it before they are imported."""
    if debugging():
        return
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def import_libraries(plan: Plan) -> None:
    """Import what a model needs, in less time than it takes by itself; blocks for seconds.

    Garbage is not collected meanwhile, which saves a fifth of the time, nor are the million objects that stay ever
    looked through again.
    """
    from switchrun.model.opening import import_model

    enabled = gc.isenabled()
    gc.disable()
    try:
        # An exception in the middle could be swallowed: C++ imports modules too, and Python itself in a `__del__`.
        with SIGNALS.at_once():
            try:
                with _stand_ins():
                    _import_others()
            except (ImportError, AttributeError, TypeError):  # another version cannot do with them
                _import_others()
            import_model(plan)
    finally:
        if enabled:
            gc.enable()
    gc.freeze()
    # The allocator is to keep what is freed: each result is new memory, and its page faults take longer than the rest.
    # With the defaults of glibc 2.36, unpacking 4 MiB of nf4 took up to 1,000 faults; now next to none. But with pieces
    # of up to 32 MiB, a batch that needed 703 MiB took 788; with up to 4 MiB, 720.
    _mallopt(_M_MMAP_THRESHOLD, 8 * MIB)
    _mallopt(_M_TRIM_THRESHOLD, 16 * MIB)


def _import_others() -> None:
    transformers: Any = import_module("transformers")
    with _one_look(Path(transformers.__file__).parent / "models"):
        import_module("transformers.models")
    for name in _LIBRARIES:
        import_module(name)


@contextmanager
def _one_look(models: Path) -> Iterator[None]:
    """Answer the second look through transformers' 3,300 model files from the first.

    Each takes 0.15 to 0.26 s of a start of 1.6 to 3.1 s (transformers 5.24). The first is cached under another name.
    """
    utils: Any = import_module("transformers.utils.import_utils")
    look = utils.define_import_structure

    def once(path: str | Path, prefix: str | None = None) -> Any:
        if prefix is not None or Path(path) != models / "__init__.py":
            return look(path, prefix)
        first = look(models, prefix="models").items()  # transformers has added what is not below models
        found = {
            backends: {name[len("models.") :]: what for name, what in modules.items() if name.startswith("models.")}
            for backends, modules in first
        }
        return {backends: modules for backends, modules in found.items() if modules}

    utils.define_import_structure = once
    try:
        yield
    finally:
        utils.define_import_structure = look


class _StandIn(ModuleType):
    """In the place of a module whose names are only imported, or called while others are imported."""

    def __init__(self, name: str, stand_in: Callable[[str], Any]) -> None:
        super().__init__(name)
        self._stand_in = stand_in

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._stand_in(name)


def _leave(function: Callable[..., Any] | None = None, *_args: Any, **_settings: Any) -> Callable[..., Any]:
    """In the place of each decorator of the compiler that says how to treat a function: leaves it as it is."""
    return _leave if function is None else function


def _masking_later(name: str) -> Callable[..., Any]:
    """Return a function that imports the real one when it is called, and calls that."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(_MASKING), name)(*args, **kwargs)

    return call


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Import without torch's compiler and distributed tensors, unless the compiler is there already; imports torch.

    transformers then does without the latter for as long as the process lives, as with a torch that was built without
    them, and its marks for the compiler are lost: this is for a process that compiles nothing.
    """
    torch: Any = import_module("torch")
    if _COMPILER in sys.modules:
        yield
        return
    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    torch._dynamo = sys.modules[_COMPILER] = _StandIn(_COMPILER, lambda _: _leave)
    sys.modules[_MASKING] = _StandIn(_MASKING, _masking_later)
    try:
        yield
    finally:
        torch.distributed.is_available = is_available
        del torch._dynamo, sys.modules[_COMPILER], sys.modules[_MASKING]
