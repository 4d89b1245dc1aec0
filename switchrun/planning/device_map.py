"""Device maps in accelerate's format: module names → a GPU's number, `cpu` or `disk`; the longest prefix counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from switchrun.checkpoint.names import mlp_prefix
from switchrun.checkpoint.types import Stack
from switchrun.errors import UsageError
from switchrun.planning.types import Tier

#: A sparse layer: its stack and its block.
SparseLayer = tuple[Stack, int]


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
            raw = json.loads(Path(source).read_text(encoding="utf-8"))
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
        return value
    if isinstance(value, str):
        if value in ("cpu", "disk"):
            return value
        number = value.removeprefix("cuda:").removeprefix("gpu:")
        if number.isdecimal():
            return int(number)
    raise UsageError(f"the device map puts '{module}' on {value!r}", "a tier is a GPU's number, cpu or disk")


def tier_of(name: str, device_map: Mapping[str, Tier]) -> Tier:
    """Give the tier of a tensor or module: that of the longest entry that it begins with.

    Raises:
        UsageError: No entry covers the name.
    """
    prefix = name
    while prefix not in device_map:
        if not prefix:
            raise UsageError(f"the device map has no entry for '{name}'", "add one, or an entry '' for all the rest")
        prefix = prefix.rpartition(".")[0]
    return device_map[prefix]


def computing_tiers(layers: Iterable[SparseLayer], placed: Mapping[str, Tier]) -> dict[SparseLayer, Tier]:
    """Give the tier that computes each sparse layer's experts: the one with its router.

    If that stays on disk, it is the first GPU that has any weights, else the CPU, to which accelerate's hooks bring it.

    Args:
        layers: The sparse layers.
        placed: Dense modules or tensors → tier; all of them.
    """
    main: Tier = min((tier for tier in placed.values() if isinstance(tier, int)), default="cpu")
    tiers = {layer: tier_of(f"{mlp_prefix(*layer)}.router.classifier.weight", placed) for layer in layers}
    return {layer: main if tier == "disk" else tier for layer, tier in tiers.items()}


def check_device_map(device_map: Mapping[str, Tier], names: Iterable[str]) -> None:
    """Refuse a map that names modules which the model does not have.

    Entries below `.mlp.experts` are let pass: accelerate's own maps may have them, and experts are placed by the
    cache. So are the two `embed_tokens`, which are `shared` by another name, and a tied `lm_head`.

    Raises:
        UsageError: An entry matches nothing.
    """
    known = {""}
    for name in [*names, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]:
        prefix = name
        while prefix:
            known.add(prefix)
            prefix = prefix.rpartition(".")[0]
    for module in device_map:
        if module not in known and ".mlp.experts" not in module:
            raise UsageError(f"the device map names '{module}', which this model does not have")
