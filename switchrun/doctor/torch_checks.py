"""Does torch work, with bitsandbytes and the GPUs? A child process tries them; here its answers become checks."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shlex
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from switchrun.doctor.check import Check, Problem
from switchrun.errors import SwitchrunError, UsageError
from switchrun.machine import children, processor
from switchrun.machine.limits import check_limits
from switchrun.units import GIB, MIB, format_bytes, format_count

#: What the child looks at, in its order.
STAGES = ("driver", "torch", "libraries", "bitsandbytes", "devices", "kernels")
NOT_TRIED = "not tried"
#: A first import from a slow disk takes half a minute; after this, something hangs.
TIMEOUT_SECONDS = 120.0

Answer = Mapping[str, Mapping[str, Any]]

_WITHOUT_KERNELS = "set SWITCHRUN_KERNELS=off to do without, and please report it"
_CHILD = "switchrun.doctor.torch_child"
_INSTALL = "https://pytorch.org/get-started/locally/"
_OLDER_CUDA = f"update the driver, or install torch for an older CUDA: {_INSTALL}"


class TorchProbe:
    """The child process: it runs from the start, and is gone at the end of the context."""

    def __init__(self, module: str = _CHILD) -> None:
        self._child = children.start_python(module)

    def answer(self, timeout: float = TIMEOUT_SECONDS) -> Answer:
        """Wait for the child and return its answers by `STAGES`; one that it didn't get to has an `error`."""
        try:
            output, errors = self._child.communicate(timeout=timeout)
            end = _describe_end(self._child.returncode, errors.decode("utf-8", "replace"))
        except subprocess.TimeoutExpired:
            output, end = children.end(self._child), f"it took more than {timeout:.0f} s"
        found: dict[str, dict[str, Any]] = {}
        for line in output.splitlines():
            with contextlib.suppress(ValueError, TypeError):
                found |= json.loads(line)
        if "error" in found.get("torch", {}):
            end = NOT_TRIED
        for stage in STAGES:
            if stage not in found:
                found[stage], end = {"error": end}, NOT_TRIED
        return found

    def __enter__(self) -> TorchProbe:
        return self

    def __exit__(self, *_: object) -> None:
        children.end(self._child)


def _describe_end(code: int, errors: str) -> str:
    if code < 0:
        return f"the process was ended by {next((each.name for each in signal.Signals if each == -code), -code)}"
    lines = errors.strip().splitlines()
    return lines[-1].strip() if lines else f"the process ended with {code} and gave no answer"


def check_torch(answer: Answer) -> Check:
    """Can torch and the libraries that a fill needs be imported, and compute?"""
    try:
        check_limits()
    except SwitchrunError as error:
        return Check("torch", error.message, error.hint, type(error))
    found = answer["torch"]
    if "error" in found:
        hint = "pip install --force-reinstall torch; then try: python -c 'import torch'"
        return Check("torch", f"torch does not work: {found['error']}", hint, SwitchrunError)
    if "error" in answer["libraries"]:
        finding = f"transformers and accelerate cannot be imported: {answer['libraries']['error']}"
        return Check("torch", finding, "pip install --force-reinstall transformers accelerate", SwitchrunError)
    finding = f"{found['version']}, {found['build']} build, {format_count(found['threads'], 'thread')}, "
    if processor.has_bf16_instructions():
        return Check("torch", f"{finding}bf16 instructions")
    return Check("torch", f"{finding}no bf16 instructions: bf16 is computed in fp32")


def check_bitsandbytes(answer: Answer) -> Check:
    """Does bitsandbytes work? Only a warning, for on the CPU switchrun mostly does without it."""
    error = answer["bitsandbytes"].get("error")
    if error is None:
        return Check("bitsandbytes", "its native library loads, and packs and unpacks 4 bit")
    if error == NOT_TRIED:
        return Check("bitsandbytes", "not tried, since torch does not work", "fix torch first")
    finding = f"{error}; int8 and nf4 need it on a GPU, and nf4 on some CPUs"
    hint = "pip install --force-reinstall bitsandbytes; then see: python -m bitsandbytes"
    return Check("bitsandbytes", finding, hint)


def check_kernels(answer: Answer) -> Check:
    """Are switchrun's own kernels built, which path of them is used, and is what they compute right?"""
    found = answer["kernels"]
    if "error" in found:
        if found["error"] == NOT_TRIED:
            return Check("kernels", "not tried, since what was tried before did not work", "fix that first")
        return Check("kernels", f"they do not work: {found['error']}", _WITHOUT_KERNELS, SwitchrunError)
    paths = list(found["paths"])
    if not paths:
        why = "those that are built are for another version or system" if found["unusable"] else "they are not built"
        finding = f"{why}: everything works, by torch alone, but slowly"
        return Check("kernels", finding, f"install a C compiler such as gcc, then: {_rebuild()}")
    if "refused" in found:
        return Check("kernels", found["refused"], found["hint"], UsageError)
    wrong = found["wrong"]
    if found["used"] in wrong:
        good = [path for path in paths if path not in wrong]
        hint = f"set SWITCHRUN_KERNELS={good[-1]}, and please report it" if good else _WITHOUT_KERNELS
        return Check("kernels", f"{found['used']}: {wrong[found['used']]}", hint, SwitchrunError)
    if found["used"] is None:
        finding = "SWITCHRUN_KERNELS is off: everything works, by torch alone, but slowly"
        return Check("kernels", finding, "unset SWITCHRUN_KERNELS")
    finding = f"{found['used']} is used{', by SWITCHRUN_KERNELS' if found['named'] else ''}"
    if wrong:
        path, problem = next(iter(wrong.items()))
        return Check("kernels", f"{finding}; {path}: {problem}", "please report it")
    return Check("kernels", f"{finding}; {', '.join(paths)} multiply right")


def _rebuild() -> str:
    """Return the command that installs switchrun again from where it came from, and so builds the kernels."""
    clone = Path(__file__).parents[2]
    source = ["-e", str(clone)] if (clone / "pyproject.toml").exists() else ["--no-binary", "switchrun", "switchrun"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        stated = json.loads(importlib.metadata.distribution("switchrun").read_text("direct_url.json") or "{}")
        folder = urlsplit(stated.get("url", ""))
        if folder.scheme == "file" and source[0] != "-e" and Path(unquote(folder.path)).is_dir():
            source = [unquote(folder.path)]
    return shlex.join(["pip", "install", "--force-reinstall", "--no-deps", *source])


def check_gpus(answer: Answer, wanted: Mapping[int, int]) -> Check:
    """Do the GPUs, their driver and torch fit together? Never run on a real GPU.

    `wanted` is what a fill may take of each GPU that it uses, in bytes, by the GPU's number.
    """
    # What is free is the driver's word: by torch's, the probe itself has taken some of it.
    free = {gpu["number"]: {"free_bytes": gpu["free_bytes"]} for gpu in answer["driver"].get("gpus", [])}
    gpus = [gpu | free.get(number, {}) for number, gpu in enumerate(answer["devices"].get("found", []))]
    works = {number for number, gpu in enumerate(gpus) if "error" not in gpu}
    problems = [_mismatch(answer, len(gpus))]
    if missing := [number for number in wanted if number >= len(gpus)]:
        finding = f"gpu:{missing[0]} is asked for, and torch finds {format_count(len(gpus), 'GPU')}"
        problems.append((finding, "correct the GPU's number"))
    # Those that do not work come first.
    numbers = sorted(range(len(gpus)), key=works.__contains__)
    problems += [_gpu_problem(number, gpus[number], wanted.get(number, 0)) for number in numbers]
    problem = next(filter(None, problems), None)
    if problem and set(wanted) - works:
        return Check("gpu", problem[0], f"{problem[1]}; or do without: --gpu-memory 0", UsageError)
    if problem:
        return Check("gpu", *problem)
    if not gpus:
        return Check("gpu", "none; everything runs on the CPU")
    driver = answer["driver"].get("version")
    described = [f"{gpu['device']} {gpu['name']}, {_free(gpu)}" for gpu in gpus]
    return Check("gpu", "; ".join([*described, *([f"driver {driver}"] if driver else [])]))


def _mismatch(answer: Answer, seen: int) -> Problem | None:
    driver, torch = answer["driver"], answer["torch"]
    if "error" in driver:
        return f"asking the NVIDIA driver failed: {driver['error']}", "try nvidia-smi; reinstall the driver"
    if "error" in torch:
        return "not tried, since torch does not work", "fix torch first"
    visible, build = driver["gpus"], torch["build"]
    cuda = build.startswith("CUDA")
    if visible and build == "CPU":
        finding = f"the NVIDIA driver {driver['version']} shows {visible[0]['name']}, and torch is a CPU build"
        return f"{finding}, which cannot use it", f"install a CUDA build of torch: {_INSTALL}"
    if driver["too_old"]:
        return driver["too_old"], _OLDER_CUDA
    if cuda and driver["version"] is None:
        hint = "install the driver (in a container: --gpus all); without a GPU, the CPU build of torch is smaller"
        return f"torch is built for {build}, and there is no NVIDIA driver", hint
    if cuda and not visible and not seen:
        hint = "see nvidia-smi, and what CUDA_VISIBLE_DEVICES is set to"
        return f"the NVIDIA driver {driver['version']} shows no GPU", hint
    if "error" in answer["devices"]:
        return f"torch cannot use the GPU: {answer['devices']['error']}", _OLDER_CUDA
    if cuda and seen < len(visible):
        finding = f"the driver shows {format_count(len(visible), 'GPU')}, and torch, built for {build}, {seen}"
        return finding, _OLDER_CUDA
    return None


def _gpu_problem(number: int, gpu: Mapping[str, Any], allowed: int) -> Problem | None:
    name = f"{gpu['device']}, {gpu.get('name', 'a GPU')},"
    if "error" in gpu:
        return f"{name} does not work: {gpu['error']}", f"install a build of torch for this GPU: {_INSTALL}"
    free, finding, hint = gpu["free_bytes"], f"{name} has {_free(gpu)}", "see what else is on it with nvidia-smi, or"
    if allowed > free:
        smaller = f"--gpu-memory {number}={int(free * 0.9) // MIB}MiB"
        return f"{finding}, {format_bytes(allowed)} is allowed", f"{hint} try {smaller}"
    # With less, it holds neither dense weights nor slots worth having, or other processes have most of it.
    if free < max(GIB, gpu["total_bytes"] * 0.25):
        return finding, f"{hint} leave it out of --gpu-memory"
    return None


def _free(gpu: Mapping[str, Any]) -> str:
    return f"{format_bytes(gpu['free_bytes'])} of {format_bytes(gpu['total_bytes'])} free"
