"""What a model is opened with, as one value that is checked where it is born and passed on whole."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from switchrun.checkpoint.types import HubWay
from switchrun.dtypes import DtypeChoice
from switchrun.errors import UsageError, check_count, command
from switchrun.machine import folders
from switchrun.planning.budgets import parse_gpu_memory, parse_rate, parse_size
from switchrun.planning.device_map import read_device_map
from switchrun.planning.plan import BatchSize, Tier


@dataclass(frozen=True)
class OpenOptions:
    """How to open a model, for the command line, the Python API and measurements alike.

    Attributes:
        model: A folder, a Hub id with an optional `@revision`, or None for the demo model.
        dtype: `auto` (as stored), `fp32`, `bf16`, `int8` or `nf4`.
        cpu_memory: What the process may take, such as `6GiB`, or bytes; None is most of what is available.
        gpu_memory: What may be taken on GPUs: `6GiB` or bytes (of the first one), or `0=6GiB,1=20GiB`. 0 is no GPU;
            None is what is free on all GPUs less a reserve, and initialises CUDA in this process if there is a driver.
        offload_folder: Where switchrun writes; see `switchrun.machine.folders.offload_folder` for the default.
        offload_limit: What experts may take there, such as `200GB`, or bytes; None is as much as they need.
        device_map: A device map, or a file with one, which is read at once and may be a pipe; None or `auto` lets the
            planner decide.
        tokenizer: A folder or a Hub id, for checkpoints without a tokenizer.
        hub: How a model of the Hub is opened: `ranges` reads what is needed, `download` downloads all of it first, and
            `auto` downloads what is small; see `HubWay`.
        network_bandwidth: How fast the Hub is, for the estimate, such as `12MB/s`, or bytes per second; None is what
            was last measured, else an assumption.
        batch_size: Most inputs to run together; memory is reserved for as many. `auto` is as many as fit: memory is
            reserved for one, and a share of what is left.
        num_beams: Most beams that will be asked for; None is the model's own, as `generate` takes it.
        max_new_tokens: Most tokens that will be generated for an input; None as above.
        cpu_bytes: `cpu_memory` in bytes; None if that is None. This and what follows is made of the above.
        gpu_bytes: `gpu_memory` in bytes by the GPU's number; None if that is None and the map may use GPUs.
        folder: The offload folder; `limit_bytes` is `offload_limit` in bytes.
        network_rate: `network_bandwidth` in bytes per second.
        tiers: The device map that was read.

    Raises:
        UsageError: A value that makes no sense; its `option` names the field.
    """

    model: str | Path | None = None
    dtype: str = "auto"
    cpu_memory: str | int | None = None
    gpu_memory: str | int | None = None
    offload_folder: str | Path | None = None
    offload_limit: str | int | None = None
    device_map: str | Path | Mapping[str, Any] | None = None
    tokenizer: str | None = None
    hub: str = HubWay.AUTO
    network_bandwidth: str | float | None = None
    batch_size: BatchSize = 1
    num_beams: int | None = 1
    max_new_tokens: int | None = 64
    cpu_bytes: int | None = field(init=False)
    gpu_bytes: Mapping[int, int] | None = field(init=False)
    folder: Path = field(init=False)
    limit_bytes: int | None = field(init=False)
    network_rate: float | None = field(init=False)
    tiers: Mapping[str, Tier] | None = field(init=False)

    def __post_init__(self) -> None:
        for name in ("model", "offload_folder", "tokenizer"):
            # Path("") is the current folder: an unset variable of a script must not mean that.
            value = getattr(self, name)
            if value == "":
                raise UsageError(f"{name}: the name is empty", "name one, or leave it out", name)
            if not isinstance(value, str | Path | None):
                raise UsageError(f"{name}: {value!r} is not a name", "give a text, or leave it out", name)
        for name, kind in (("dtype", DtypeChoice), ("hub", HubWay)):
            value = getattr(self, name)
            if value not in kind.__members__.values():
                *names, last = kind
                raise UsageError(f"{name}: {value!r} is not one", f"use {', '.join(names)} or {last}", name)
        for name in ("num_beams", "max_new_tokens"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        size = self.batch_size
        if size != "auto" and (type(size) is not int or size < 1):
            raise UsageError(f"batch_size: {size!r} is neither auto nor a whole number above 0", option="batch_size")
        tiers = self._read_map()
        gpu_memory = self.gpu_memory
        if gpu_memory is None and tiers is not None and all(tier.gpu is None for tier in tiers.values()):
            gpu_memory = 0  # no driver is asked for what the map does not use
        derived = {
            "cpu_bytes": None if self.cpu_memory is None else parse_size("cpu_memory", self.cpu_memory),
            "gpu_bytes": None if gpu_memory is None else parse_gpu_memory(gpu_memory),
            "folder": folders.offload_folder(self.offload_folder),
            "limit_bytes": None if self.offload_limit is None else parse_size("offload_limit", self.offload_limit),
            "network_rate": parse_rate("network_bandwidth", self.network_bandwidth),
            "tiers": tiers,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _read_map(self) -> Mapping[str, Tier] | None:
        given = self.device_map
        if given is None or given == "auto":
            return None
        if not isinstance(given, str | Path | Mapping):
            raise UsageError(f"device_map: {given!r} is neither a map nor a file's name", option="device_map")
        if not isinstance(given, Mapping) and not Path(given).exists():
            dtype = None if self.dtype == DtypeChoice.AUTO else self.dtype
            model = None if self.model is None else str(self.model)
            plan = command("plan", "--format", "json", model=model, dtype=dtype, offload_folder=self.offload_folder)
            hint = f"write one with: {plan} > {shlex.quote(str(given))}"
            raise UsageError(f"device_map: there is no file '{given}'", hint, "device_map")
        return read_device_map(given)
