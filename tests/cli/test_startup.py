"""The command line imports transformers as it is, only faster: in processes of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
from switchrun.model import session

runs = []

def broken(plan):
    runs.append(plan)
    raise ImportError("a fault of our own")

session.import_model = broken
try:
    import_libraries(SimpleNamespace())
except ImportError as error:
    assert str(error) == "a fault of our own"
assert len(runs) == 1
"""


@pytest.mark.parametrize("script", [STAND_INS, FALLS_BACK, OWN_FAULT], ids=["stand-ins", "falls-back", "own-fault"])
def test_transformers_is_imported_as_it_is(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
