"""`--synthetic`: a checkpoint of a published geometry, made before anything is downloaded, and kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchrun.bench.page_cache import drop_page_cache
from switchrun.errors import BudgetError, UsageError
from switchrun.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from switchrun.bench.synthetic import Geometry

_MARK = "synthetic.json"
#: Changes when the same parameters give other files.
_VERSION = 1
_SPEC = re.compile(r"(?:switch-)?([\w-]+?)(?::experts=(\d+))?")
_HINT = "write it like switch-c-2048, base-128 or switch-c-2048:experts=16"


@dataclass(frozen=True, slots=True)
class Synthetic:
    """A synthetic checkpoint that is there.

    Attributes:
        path: Its folder.
        description: What stands in every record of it.
    """

    path: Path
    description: dict[str, Any]


def make_synthetic(spec: str, materialize: str | None, offload_folder: Path, tell: Callable[[str], None]) -> Synthetic:
    """Make a synthetic checkpoint in the offload folder, or find the one that was made before.

    Key names and config.json are transformers' own, so that plain transformers can load it too.

    Args:
        spec: A geometry's name, with or without `switch-`, and perhaps `:experts=N` for N experts in each layer.
        materialize: How many bytes of experts shall be real, as `--materialize` has it; None is none.
        offload_folder: Where it is made, under `synthetic/`.
        tell: Called with a line for a human if it has to be made.

    Raises:
        UsageError: There is no such geometry, or less is to be real than two experts of each layer.
        BudgetError: The disk has no room for it.
    """
    # The geometries come with torch, which takes seconds to import: not before somebody asks for one.
    from switchrun.bench.synthetic import make_checkpoint, restrict_to

    name, geometry = _parse(spec)
    layers = 2 * sum(map(geometry.sparse, range(geometry.num_layers)))
    real = None if materialize is None else _experts_of(materialize, geometry, layers)
    description = {
        "geometry": name,
        "num_experts": geometry.num_experts,
        "materialized_experts": real or 0,
        "note": _note(real, geometry.num_experts),
    }
    folder = offload_folder / "synthetic" / f"{name}-{geometry.num_experts}-{real or 0}"
    mark = {"version": _VERSION, "geometry": asdict(geometry), "materialized_experts": real or 0}
    if _marked(folder / _MARK) == mark:
        return Synthetic(folder, description)
    needed = _dense_bytes(geometry) + (real or 0) * layers * geometry.expert_bytes
    _check_room(offload_folder, needed)
    tell(f"making {folder}: {format_bytes(needed)} of random weights")
    shutil.rmtree(folder, ignore_errors=True)
    make_checkpoint(folder, geometry, materialize=None if real is None else restrict_to(range(real)), routed=real)
    drop_page_cache(folder.iterdir())
    # Written last: it tells that everything is there.
    (folder / _MARK).write_text(json.dumps(mark), encoding="utf-8")
    return Synthetic(folder, description)


def _parse(spec: str) -> tuple[str, Geometry]:
    from switchrun.bench.synthetic import GEOMETRIES

    match = _SPEC.fullmatch(spec.strip())
    name = f"switch-{match[1]}" if match else ""
    if match is None or name not in GEOMETRIES:
        raise UsageError(f"--synthetic: '{spec}' is not a geometry", f"{_HINT}; there are: {', '.join(GEOMETRIES)}")
    geometry = replace(GEOMETRIES[name], hub_faults=False)
    if match[2] is None:
        return name, geometry
    count = int(match[2])
    if not 2 <= count <= geometry.num_experts:
        raise UsageError(f"--synthetic: {name} has 2 to {geometry.num_experts} experts a layer, not {count}", _HINT)
    return name, replace(geometry, num_experts=count)


def _experts_of(size: str, geometry: Geometry, layers: int) -> int:
    """Give how many experts of each layer a size has room for."""
    try:
        wanted = parse_bytes(size)
    except UsageError as error:
        raise UsageError(f"--materialize: {error.message}", error.hint) from None
    count = min(wanted // (layers * geometry.expert_bytes), geometry.num_experts)
    if count < 2:
        least = 2 * layers * geometry.expert_bytes
        raise UsageError(
            f"--materialize: {format_bytes(wanted)} is less than two experts in each of {layers} layers",
            f"give at least {-(-least // 2**20)}MiB",
        )
    return count


def _note(real: int | None, count: int) -> str:
    if real is None:
        return "the weights are synthetic, and experts are holes that cost no disk time: reading speeds mean nothing"
    part = "all" if real == count else f"{real} of {count}"
    return (
        f"the weights are synthetic: random numbers in {part} experts of each layer, and what comes out means nothing"
    )


def _dense_bytes(geometry: Geometry) -> int:
    inner = geometry.num_heads * geometry.d_kv
    blocks = geometry.num_layers * 3 * 4 * inner * geometry.d_model
    embeddings = (1 if geometry.tied else 2) * geometry.vocab_size * geometry.d_model
    dense_blocks = sum(not geometry.sparse(block) for block in range(geometry.num_layers))
    routers = 2 * (geometry.num_layers - dense_blocks) * geometry.num_experts * geometry.d_model
    return 2 * (blocks + embeddings + routers) + 2 * dense_blocks * geometry.expert_bytes


def _check_room(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BudgetError(
            f"{folder} has {format_bytes(free)} free, the synthetic checkpoint takes {format_bytes(needed)}",
            "lower --materialize or use another --offload-folder",
        )


def _marked(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
