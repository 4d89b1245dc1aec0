"""Imports torch and tries it, in a process of its own: what is broken there must not take doctor down.

Run as a file: `python -P torch_child.py`. The answer is a line of JSON on stdout for each thing that was looked at, as
soon as it was, so that the last one tells where a crash came; whatever the libraries print goes to stderr.

What it does with a GPU was never run on a real one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

#: Copied to a GPU to measure the bandwidth; less where less is free.
_COPY_BYTES = 256 * 1024**2
_COPIES = 5


def main() -> None:
    """Look at one thing after the other."""
    # What the libraries make while they are imported stays; looking it through again and again takes a second or two.
    gc.disable()
    looks = {
        "driver": _driver,
        "torch": _torch,
        "libraries": _libraries,
        "bitsandbytes": _bitsandbytes,
        "devices": _devices,
    }
    with _own_stdout() as answer:
        for name, look in looks.items():
            try:
                found = look()
            # Whatever a broken library raises is the finding.
            except Exception as error:
                found = {"error": _first_line(error)}
            os.write(answer, json.dumps({name: found}).encode() + b"\n")
            if name == "torch" and "error" in found:
                break  # the others stand on it


def _driver() -> dict[str, Any]:
    # At the end of the path, where it shadows nothing; the package need not be installed.
    sys.path.append(str(Path(__file__).parents[2]))
    from switchrun import gpus

    return {
        "version": gpus.driver_version(),
        "too_old": gpus.driver_too_old(),
        "gpus": [asdict(gpu) for gpu in gpus.visible_gpus()],
    }


@contextlib.contextmanager
def _own_stdout() -> Iterator[int]:
    """Give stdout as a descriptor of its own, and send what is printed meanwhile, by C libraries too, to stderr."""
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        yield answer
    finally:
        os.close(answer)


def _torch() -> dict[str, Any]:
    import torch

    ones = torch.ones(64, 64)
    if float((ones @ ones).sum()) != 64**3:
        raise RuntimeError("a product of two matrices of ones is wrong")
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "xpu": getattr(torch.version, "xpu", None),
        "threads": torch.get_num_threads(),
    }


def _libraries() -> dict[str, Any]:
    """Import what a fill imports besides."""
    for module in ("transformers.models.switch_transformers.modeling_switch_transformers", "accelerate"):
        importlib.import_module(module)
    return {}


def _bitsandbytes() -> dict[str, Any]:
    import torch

    from switchrun.experts.bnb import operations

    operations()
    from bitsandbytes import cextension

    library = type(cextension.lib).__name__
    if library.startswith("ErrorHandler"):
        raise RuntimeError("its native library could not be loaded")
    devices = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        devices += [f"{kind}:{number}" for number in range(torch.accelerator.device_count())]
    for device in devices:
        _try_4bit(torch, device)
    return {"library": library}


def _try_4bit(torch: Any, device: str) -> None:
    """Pack a small matrix and unpack it: NF4's own error is about 0.09."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(device)
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit(weight, 64, "nf4", torch.uint8)
    again = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", weight.shape, weight.dtype)
    error = float((again - weight).norm() / weight.norm())
    if not error < 0.2:
        raise RuntimeError(f"on {device} a matrix unpacked from 4 bit is off by {error:.2f} of itself")


def _devices() -> dict[str, Any]:
    import torch

    if torch.version.cuda and not torch.cuda.is_available():
        # torch knows why, and tells only whoever insists.
        with contextlib.suppress(AssertionError):
            torch.cuda.init()  # type: ignore[no-untyped-call]
    if not torch.accelerator.is_available():
        return {"found": []}
    kind = str(torch.accelerator.current_accelerator())
    return {"found": [_device(torch, kind, number) for number in range(torch.accelerator.device_count())]}


def _device(torch: Any, kind: str, number: int) -> dict[str, Any]:
    device = f"{kind}:{number}"
    found: dict[str, Any] = {"device": device}
    try:
        module = torch.get_device_module(kind)
        found["name"] = module.get_device_name(number)
        free, total = module.mem_get_info(number)
        found |= {"free_bytes": free, "total_bytes": total, "bf16_instructions": _gpu_bf16(module, number)}
        ones = torch.ones(256, 256, device=device)
        if float((ones @ ones).sum()) != 256**3:
            raise RuntimeError("a product of two matrices of ones is wrong")
        found |= copy_rate(torch, device, min(_COPY_BYTES, free // 4), lambda: torch.accelerator.synchronize(device))
    except Exception as error:
        found["error"] = _first_line(error)
    return found


def _gpu_bf16(module: Any, number: int) -> bool | None:
    """Tell whether a GPU multiplies bf16 itself, as NVIDIA's do from Ampere on; None where torch does not tell."""
    try:
        with module.device(number):
            return bool(module.is_bf16_supported(including_emulation=False))
    except (AttributeError, TypeError):
        return None


def copy_rate(torch: Any, device: str, size: int, wait: Callable[[], None]) -> dict[str, Any]:
    """Copy page-locked memory to a device a few times and give the best rate.

    Args:
        torch: The module.
        device: Where to.
        size: Bytes of a copy.
        wait: Returns once the device has done all that it was told to.

    Returns:
        `host_to_device_bytes_per_second`, and `page_lock_error` if the memory could not be page-locked: then the
        rate is that of ordinary memory.
    """
    found: dict[str, Any] = {}
    source = torch.ones(size, dtype=torch.uint8)
    try:
        source = source.pin_memory()
    except RuntimeError as error:
        found["page_lock_error"] = _first_line(error)
    target = torch.empty_like(source, device=device)
    seconds = []
    for _ in range(_COPIES):
        wait()
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        wait()
        seconds.append(time.perf_counter() - start)
    return found | {"host_to_device_bytes_per_second": size / min(seconds)}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    sys.stderr.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    main()
