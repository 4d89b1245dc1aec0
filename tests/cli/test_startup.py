"""The command line imports transformers as it is, only faster: in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from switchrun.cli.startup import let_threads_sleep

ONCE = """
import collections, sys
from pathlib import Path
opened = collections.Counter()
sys.addaudithook(lambda event, args: opened.update([str(args[0])]) if event == "open" else None)

from switchrun.cli.startup import _import_others
_import_others()
import transformers
from transformers.utils import import_utils
models = Path(transformers.__file__).parent / "models"
twice = [path for path, count in opened.items() if count > 1 and path.startswith(str(models)) and path.endswith(".py")]
assert len(opened) > 1000, len(opened)
assert len(twice) < 20, len(twice)

look = import_utils.define_import_structure
assert look.__name__ == "define_import_structure"
genuine = look(str(models / "__init__.py"))
theirs = import_utils._LazyModule("transformers.models", str(models / "__init__.py"), genuine)
assert set(dir(sys.modules["transformers.models"])) == set(dir(theirs))
assert transformers.models.t5.T5Config is transformers.T5Config
"""

STAND_INS = """
import sys
from types import SimpleNamespace
from switchrun.cli.startup import import_libraries
import torch

available = torch.distributed.is_available()
bf16 = SimpleNamespace(precision=SimpleNamespace(packed=None, compute=None))
import_libraries(bf16)
heavy = [name for name in ("torch._dynamo", "torch.distributed.tensor", "sympy") if name in sys.modules]
assert not heavy, heavy
assert torch.distributed.is_available() == available

from transformers import masking_utils
made = masking_utils.TransformGetItemToIndex()  # a stand-in's function, and a real context manager
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
assert isinstance(made, TransformGetItemToIndex)
assert torch._dynamo is sys.modules["torch._dynamo"] and torch._dynamo.__file__
assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item() == 2
"""

FALLS_BACK = """
import sys
from types import SimpleNamespace
from switchrun.cli import startup
from switchrun.cli.startup import import_libraries

asked = []

def refuse(self, name):
    asked.append(name)
    raise AttributeError(name)

startup._StandIn.__getattr__ = refuse
import_libraries(SimpleNamespace(precision=SimpleNamespace(packed=None, compute=None)))
assert [name for name in asked if not name.startswith("__")], asked
assert sys.modules["torch._dynamo"].__file__
assert sys.modules["switchrun.model.engine"].Engine
"""

OWN_FAULT = """
import sys
from types import SimpleNamespace
from switchrun.cli.startup import import_libraries
from switchrun.model import opening

runs = []

def broken(plan):
    runs.append(plan)
    raise ImportError("a fault of our own")

opening.import_model = broken
try:
    import_libraries(SimpleNamespace())
except ImportError as error:
    assert str(error) == "a fault of our own"
assert len(runs) == 1
"""


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "script", [ONCE, STAND_INS, FALLS_BACK, OWN_FAULT], ids=["once", "stand-ins", "falls-back", "own-fault"]
)
def test_transformers_is_imported_as_it_is(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("own", [None, "ACTIVE"])
def test_threads_of_torch_sleep_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, own: str | None) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", own or "")
    if own is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    let_threads_sleep()
    assert os.environ["OMP_WAIT_POLICY"] == (own or "PASSIVE")


def test_threads_share_one_heap() -> None:
    """What many threads allocate lies between the bounds of one heap; glibc would begin another for each."""
    script = """
import ctypes, threading
from switchrun.cli.startup import share_one_heap
share_one_heap()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
heaps = set()
barrier = threading.Barrier(4)
def take():
    barrier.wait()
    pieces = [libc.malloc(4000) for _ in range(100)]
    barrier.wait()
    heaps.update(piece >> 26 for piece in pieces)
threads = [threading.Thread(target=take) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert max(heaps) - min(heaps) <= 1, heaps
"""
    subprocess.run([sys.executable, "-c", script], check=True)
