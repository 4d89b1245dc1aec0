"""Does torch work? A child process imports it and tries it; here its answer becomes checks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from switchrun import hardware
from switchrun.doctor.check import Check, failed, passed, warned
from switchrun.units import format_count

#: A first import from a slow disk takes half a minute; after this, something hangs.
TIMEOUT_SECONDS = 120.0

#: What `torch_child` looks at, in its order.
STAGES = ("driver", "torch", "libraries", "bitsandbytes", "devices")
NOT_TRIED = "not tried"

Answer = Mapping[str, Mapping[str, Any]]

_CHILD = (sys.executable, "-P", str(Path(__file__).with_name("torch_child.py")))
_MEND = "install it anew: pip install --force-reinstall torch; then try: python -c 'import torch'"


class TorchProbe:
    """A child process that looks at torch; it runs from the start, and is gone at the end of the context.

    Args:
        command: What to run.
        timeout: Seconds before it is killed.
    """

    def __init__(self, command: Sequence[str] = _CHILD, timeout: float = TIMEOUT_SECONDS) -> None:
        self._end = time.monotonic() + timeout
        self._timeout = timeout
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C is for us: we end the child, and whatever it has started.
            start_new_session=True,
        )

    def answer(self) -> Answer:
        """Wait for what the child has found.

        Returns:
            What it found by the names in `STAGES`, all of them: one that it did not get through has an `error`.
        """
        try:
            output, errors = self._child.communicate(timeout=max(0.0, self._end - time.monotonic()))
            end = _describe_end(self._child.returncode, errors.decode("utf-8", "replace"))
        except subprocess.TimeoutExpired:
            self._kill()
            output, _ = self._child.communicate()
            end = f"it took more than {self._timeout:.0f} s"
        found: dict[str, dict[str, Any]] = {}
        for line in output.splitlines():
            with contextlib.suppress(ValueError):
                answer = json.loads(line)
                if isinstance(answer, dict):
                    found |= answer
        for stage in STAGES:
            if stage not in found:
                found[stage] = {"error": end}
                end = NOT_TRIED
            elif stage == "torch" and "error" in found[stage]:
                end = NOT_TRIED
        return found

    def _kill(self) -> None:
        if self._child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._child.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the child if it still runs."""
        self._kill()
        self._child.communicate()

    def __enter__(self) -> TorchProbe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_torch(answer: Answer) -> Check:
    """Tell whether torch and the libraries that a fill needs can be imported and compute."""
    found = answer["torch"]
    if "error" in found:
        return failed("torch", f"torch does not work: {found['error']}", _MEND, torch_error=found["error"])
    build, bf16 = build_of(found), hardware.has_bf16_instructions()
    details = {
        "torch_version": found["version"],
        "torch_build": build,
        "threads": found["threads"],
        "bf16_instructions": bf16,
    }
    broken = answer["libraries"].get("error")
    if broken:
        mend = "pip install --force-reinstall transformers accelerate"
        finding = f"transformers and accelerate cannot be imported: {broken}"
        return failed("torch", finding, mend, torch_error=broken, **details)
    finding = f"{found['version']}, {build} build, {format_count(found['threads'], 'thread')}"
    finding += ", bf16 instructions" if bf16 else ", no bf16 instructions: bf16 is computed in fp32"
    return passed("torch", finding, **details)


def check_bitsandbytes(answer: Answer) -> Check:
    """Tell whether bitsandbytes works; on the CPU switchrun mostly does without it."""
    error = answer["bitsandbytes"].get("error")
    if error is None:
        return passed("bitsandbytes", "its native library loads, and packs and unpacks 4 bit")
    if error == NOT_TRIED:
        return warned("bitsandbytes", "not tried, since torch does not work", "mend torch first")
    return warned(
        "bitsandbytes",
        f"{error}; int8 and nf4 need it on a GPU, and nf4 on some CPUs",
        "pip install --force-reinstall bitsandbytes; then see: python -m bitsandbytes",
        bitsandbytes_error=error,
    )


def build_of(torch: Mapping[str, Any]) -> str:
    """Name what a torch is built for: `CUDA 12.8`, `ROCm 6.3`, `XPU` or `CPU`."""
    if torch["cuda"]:
        return f"CUDA {torch['cuda']}"
    if torch["hip"]:
        return f"ROCm {torch['hip']}"
    return "XPU" if torch["xpu"] else "CPU"


def _describe_end(code: int, errors: str) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = str(-code)
        return f"the process was ended by {name}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else f"the process ended with {code} and gave no answer"
