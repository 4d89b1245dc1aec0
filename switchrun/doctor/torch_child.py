"""Imports torch and tries it, in a process of its own: what is broken there must not take doctor down.

It answers a line of JSON on stdout for each look, at once, so that the last line shows where a crash came. What it does
with a GPU was never run on a real one.
"""

from __future__ import annotations

import importlib
import json
import os
from dataclasses import asdict
from typing import Any

from switchrun.errors import SwitchrunError


def main() -> None:
    """Look at one thing after the other."""
    # stdout is for answers alone: what libraries print, in C too, goes to stderr.
    answers = os.dup(1)
    os.dup2(2, 1)
    looks = {
        "driver": _driver,
        "torch": _torch,
        "libraries": _libraries,
        "bitsandbytes": _bitsandbytes,
        "devices": _devices,
        "kernels": _kernels,
    }
    for name, look in looks.items():
        try:
            found = look()
        except Exception as error:  # whatever a broken library raises is the finding
            found = {"error": _describe(error)}
        os.write(answers, json.dumps({name: found}).encode() + b"\n")
        if name == "torch" and "error" in found:
            break  # the others need it


def _driver() -> dict[str, Any]:
    from switchrun.machine import gpus

    visible = [asdict(gpu) for gpu in gpus.visible_gpus()]
    return {"version": gpus.driver_version(), "too_old": gpus.driver_too_old(), "gpus": visible}


def _torch() -> dict[str, Any]:
    import torch

    _multiply(torch, "cpu")
    return {"version": torch.__version__, "build": build_of(torch.version), "threads": torch.get_num_threads()}


def build_of(version: Any) -> str:
    """Name what a torch is built for, by its `torch.version`: `CUDA 12.8`, `ROCm 6.3`, `XPU 20250302` or `CPU`."""
    makers = {"CUDA": version.cuda, "ROCm": version.hip, "XPU": getattr(version, "xpu", None)}
    return next((f"{name} {number}" for name, number in makers.items() if number), "CPU")


def _libraries() -> dict[str, Any]:
    for module in ("transformers.models.switch_transformers.modeling_switch_transformers", "accelerate"):
        importlib.import_module(module)
    return {}


def _bitsandbytes() -> dict[str, Any]:
    import torch

    from switchrun.experts import accelerator
    from switchrun.kernels.bitsandbytes_ops import operations

    library = operations()
    from bitsandbytes import cextension

    if type(cextension.lib).__name__.startswith("ErrorHandler"):
        raise RuntimeError("its native library could not be loaded")
    for device in ["cpu", *(str(accelerator.device(number)) for number in range(accelerator.device_count()))]:
        weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(device)
        packed, absmax = library.quantize_4bit(weight, 64, "nf4", torch.uint8)
        again = library.dequantize_4bit(packed, absmax, 64, "nf4", weight.shape, weight.dtype)
        error = float((again - weight).norm() / weight.norm())
        if not error < 0.2:  # NF4's own error is about 0.09
            raise RuntimeError(f"on {device} a matrix unpacked from 4 bit is off by {error:.2f} of itself")
    return {}


def _devices() -> dict[str, Any]:
    import torch

    from switchrun.experts import accelerator

    if torch.version.cuda and not torch.cuda.is_available():
        torch.cuda.init()  # type: ignore[no-untyped-call] # torch says why only if made to try
    found: list[dict[str, Any]] = []
    for number in range(accelerator.device_count()):
        device = accelerator.device(number)
        found.append({"device": str(device)})
        try:
            found[-1]["name"] = accelerator.module().get_device_name(device)
            found[-1]["free_bytes"], found[-1]["total_bytes"] = accelerator.module().mem_get_info(device)
            _multiply(torch, device)
        except Exception as error:
            found[-1]["error"] = _describe(error)
    return {"found": found}


def _kernels() -> dict[str, Any]:
    """Try every path that is here, after all else: what a crash here takes with it has been looked at."""
    import torch

    from switchrun.kernels import libraries

    named = os.environ.get(libraries.VARIABLE, "")
    found: dict[str, Any] = {"named": named, "paths": libraries.paths(), "unusable": libraries.unusable(), "wrong": {}}
    for path in libraries.paths():
        os.environ[libraries.VARIABLE] = path
        for product, off in _products(torch).items():
            if not off < 1e-5:
                found["wrong"][path] = f"its product with {product} is off by {off:.1g} of itself"
    os.environ[libraries.VARIABLE] = named
    try:
        found["used"] = libraries.path()
    except SwitchrunError as error:
        found["refused"], found["hint"] = error.message, error.hint
    return found


def _products(torch: Any) -> dict[str, float]:
    """Return how far the product with a small matrix of each format is off, by the path in use."""
    from switchrun.kernels import native, qmoe
    from switchrun.kernels.nf4 import NF4_VALUES
    from switchrun.store.layout import nf4_sizes

    rows, columns = 37, 130
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=generator)

    def digits(most: int, *shape: int) -> Any:
        return torch.randint(0, most, shape, generator=generator, dtype=torch.uint8)

    x, plain, scales, extremes = random(3, columns), random(rows, columns).bfloat16(), random(rows), random(rows, 2)
    codes, ternary, extremes = (
        digits(256, rows, columns).view(torch.int8),
        digits(3, rows, columns),
        extremes.bfloat16(),
    )
    packed_bytes, blocks = nf4_sizes(rows, columns)
    packed, absmax = digits(256, packed_bytes), random(blocks).bfloat16()
    nibbles = torch.stack([packed >> 4, packed & 15], 1).flatten()[: rows * columns].long()
    steps = absmax.double().repeat_interleave(64)[: rows * columns]
    values = torch.cat([torch.zeros(rows, 1), extremes.float()], 1)
    wanted = {
        "bf16": (native.linear_bf16(x, plain), plain),
        "int8": (native.linear_int8(x, codes, scales), codes.double() * (scales.double() / 127).unsqueeze(1)),
        "nf4": (
            native.linear_nf4(x, packed, absmax, (rows, columns)),
            (torch.tensor(NF4_VALUES, dtype=torch.float64)[nibbles] * steps).view(rows, columns),
        ),
        "qmoe": (qmoe.linear_qmoe(x, qmoe.encode(ternary, extremes.flatten())), values.gather(1, ternary.long())),
    }
    found: dict[str, float] = {}
    for name, (result, weight) in wanted.items():
        right = x.double() @ weight.double().T
        found[name] = float((result.double() - right).norm() / right.norm())
    return found


def _multiply(torch: Any, device: Any) -> None:
    ones = torch.ones(256, 256, device=device)
    if float((ones @ ones).sum()) != 256**3:
        raise RuntimeError("a product of two matrices of ones is wrong")


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    main()
