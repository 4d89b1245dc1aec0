"""What importing bitsandbytes does to a process: in one of its own, since it happens once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from switchrun.kernels.bitsandbytes_ops import operations
assert "bitsandbytes" not in sys.modules
operations().dequantize_4bit
assert "kernels" not in sys.modules
import kernels
assert kernels.CALLS == []
"""

KERNELS = """
CALLS = []
def get_kernel(*args, **options):
    CALLS.append(args)
    raise AssertionError("native code would be downloaded here")
"""


def test_bitsandbytes_is_imported_late_silently_and_without_downloading_code(tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}, check=False)
    assert (done.returncode, done.stderr) == (0, "")
