"""Device maps: module names → tiers; the longest prefix counts. Files have them in accelerate's format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from switchrun.checkpoint.names import mlp_prefix
from switchrun.errors import UsageError, printable
from switchrun.planning.plan import CPU, DISK, SparseLayer, Tier, gpu_tier, main_tier
from switchrun.units import MIB, format_bytes

#: Other names that `shared` may go by; accelerate looks for each of them in a device map.
SHARED_ALIASES = ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
#: accelerate's own map of switch-c-2048, each expert by name, has 10 MiB.
_MOST_BYTES = 64 * MIB


def read_device_map(source: str | Path | Mapping[str, Any]) -> dict[str, Tier]:
    """Read a device map: the JSON of `switchrun plan --format json`, or a plain one of accelerate's.

    Args:
        source: A file, or the map itself.

    Raises:
        UsageError: The file cannot be read, or it is not a device map.
    """
    if isinstance(source, Mapping):
        raw: Any = source
    else:
        try:
            with open(source, "rb") as file:  # a pipe too, if the user names one
                text = file.read(_MOST_BYTES + 1)
            if len(text) > _MOST_BYTES:
                raise UsageError(f"the device map {source} is larger than {format_bytes(_MOST_BYTES)}")
            raw = json.loads(text)
        except OSError as error:
            raise UsageError(f"cannot read the device map {source}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the device map {source} is not JSON: {error}") from None
    if isinstance(raw, Mapping) and isinstance(raw.get("device_map"), Mapping):
        raw = raw["device_map"]
    if not isinstance(raw, Mapping) or not raw:
        raise UsageError(
            "a device map is a JSON object of module names and tiers", "see `switchrun plan --format json`"
        )
    return {str(module): _tier(str(module), value) for module, value in raw.items()}


def _tier(module: str, value: Any) -> Tier:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return gpu_tier(value)
    if isinstance(value, str):
        if value in (CPU, DISK):
            return Tier(value)
        number = value.removeprefix("cuda:").removeprefix("gpu:")
        if number.isdecimal() and len(number) < 10:
            return gpu_tier(int(number))
    # What is nested may be so deeply that it cannot be shown.
    shown = "a list or an object" if isinstance(value, list | dict) else printable(repr(value), 200)
    raise UsageError(
        f"the device map puts '{printable(module, 200)}' on {shown}", "a tier is a GPU's number, cpu or disk"
    )


def tier_of(name: str, device_map: Mapping[str, Tier]) -> Tier:
    """Return the tier of a tensor or module: that of the longest entry that it begins with.

    Raises:
        UsageError: No entry covers the name.
    """
    for prefix in (*_prefixes(name), ""):
        if prefix in device_map:
            return device_map[prefix]
    raise UsageError(f"the device map has no entry for '{name}'", "add one, or an entry '' for all the rest")


def _prefixes(name: str) -> list[str]:
    """Return `a.b.c`, `a.b` and `a`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def computing_tiers(layers: Iterable[SparseLayer], placed: Mapping[str, Tier]) -> dict[SparseLayer, Tier]:
    """Return the tier that computes each sparse layer's experts: the one with its router.

    If that stays on disk, it is the first GPU that has any of the weights `placed`, else the CPU, to which accelerate's
    hooks bring it.
    """
    main = main_tier(placed.values())
    tiers = {layer: tier_of(f"{mlp_prefix(*layer)}.router.classifier.weight", placed) for layer in layers}
    return {layer: main if tier == DISK else tier for layer, tier in tiers.items()}


def check_device_map(device_map: Mapping[str, Tier], names: Iterable[str]) -> None:
    """Raise a `UsageError` if a map names modules which the model does not have.

    Entries below `.mlp.experts` pass: accelerate's own maps may have them, and experts are placed by the cache. So do
    other names of `shared`.
    """
    names = [*names, *(f"{alias}.weight" for alias in SHARED_ALIASES)]
    known = {"", *(prefix for name in names for prefix in _prefixes(name))}
    for module in device_map:
        if module not in known and ".mlp.experts" not in module:
            raise UsageError(f"the device map names '{module}', which this model does not have")


def check_layers(placed: Mapping[str, Tier]) -> None:
    """Raise a `UsageError` if a layer of a block is split: it adds its output to its input, both on one device."""
    # What stays on disk computes there too.
    first = main_tier(placed.values())
    devices: dict[str, Tier] = {}
    for name, tier in placed.items():
        parts = name.split(".")
        if parts[1] != "block":
            continue
        layer = ".".join(parts[:5])
        device = first if tier == DISK else tier
        if devices.setdefault(layer, device) != device:
            raise UsageError(
                f"the device map lets '{layer}' compute on {devices[layer]} and {device}",
                "put all of it on one device",
            )
