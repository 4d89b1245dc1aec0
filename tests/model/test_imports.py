"""transformers is imported as it is, only without looking through its models twice: in a process of its own."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import collections, sys
from pathlib import Path
opened = collections.Counter()
sys.addaudithook(lambda event, args: opened.update([str(args[0])]) if event == "open" else None)

from switchrun.model.imports import _import_transformers, _below
_import_transformers()
import transformers
from transformers.utils import import_utils
models = Path(transformers.__file__).parent / "models"
twice = [path for path, count in opened.items() if count > 1 and path.startswith(str(models)) and path.endswith(".py")]
assert len(opened) > 1000, len(opened)
assert len(twice) < 20, len(twice)

look = import_utils.define_import_structure
assert look.__name__ == "define_import_structure"
genuine = look(str(models / "__init__.py"))
assert _below(look(models, prefix="models"), "models") == genuine
theirs = import_utils._LazyModule("transformers.models", str(models / "__init__.py"), genuine)
assert set(dir(sys.modules["transformers.models"])) == set(dir(theirs))
assert transformers.models.t5.T5Config is transformers.T5Config
"""


def test_transformers_reads_the_files_of_its_models_once() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
