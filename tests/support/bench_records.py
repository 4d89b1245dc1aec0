"""Records of made-up measurements."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from switchrun.bench.records import SCHEMA_VERSION, Record, cell_record
from switchrun.bench.runner import Cell

GIB = 1024**3
_STAGE = {
    "requests": 0, "hits": 0, "loads": 0, "load_bytes": 0, "load_seconds": 0.0, "wait_seconds": 0.0, "hub_loads": 0,
    "hub_bytes": 0,
}  # fmt: skip


def measured(
    *,
    wait: float = 7.1,
    experts: float = 1.9,
    dense: float = 1.0,
    loads: int = 200,
    used: int = 200,
    hub_bytes: int | None = None,
    plan: dict[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    layers: int = 2,
    **knobs: Any,
) -> Record:
    """Return the record of one fill in which some experts were loaded for some that are different."""
    made = {
        "dtype": "bf16", "stored_dtype": "BF16", "num_experts": 480, "experts_per_layer": 16,
        "expert_bytes": 51_118_080, "total_bytes": 26 * GIB, "expert_slots": 40, "slot_bytes": 51_130_368,
        "dense_bytes": GIB, "cpu_budget_bytes": 4 * GIB, "repairs": [],
    } | (plan or {})  # fmt: skip
    stage = {"seconds": 5.0, "expert_layer_seconds": (wait + experts) / 2, "gpus": _STAGE}
    counters = _STAGE | {"requests": 480, "hits": 480 - loads, "loads": loads, "wait_seconds": wait}
    counters |= {"load_bytes": loads * made["slot_bytes"], "hub_bytes": hub_bytes or 0}
    names = [f"{stack}.{block}" for stack in ("encoder", "decoder") for block in range(layers)]
    use: dict[str, dict[str, int]] = {name: {} for name in names}
    for number in range(used):
        use[names[number % len(names)]][str(number // len(names) * 3 % made["experts_per_layer"])] = 1 + number % 7
    fill = {
        "seconds": wait + experts + dense,
        "token_seconds": [3.0, 3.5, 4.0],
        "stages": {"encoder": stage | {"counters": _STAGE}, "decoder": stage | {"counters": counters}},
        "output_ids": [[0, 5]],
        "io_read_bytes": 6000,
        "hub": None if hub_bytes is None else {"bytes": hub_bytes, "requests": 9, "retries": 0},
        "peak_rss_bytes": 4 * GIB,
        "peak_gpu_bytes": None,
        "raw": [],
        "expert_use": use,
    }
    answer = {
        "open_seconds": 2.7, "open_io_read_bytes": 1000, "plan": made, "fills": [fill], "warnings": [],
        "timeline": [[0.1, 10**8], [2.7, 2 * GIB], [12.7, 4 * GIB]], "open_hub": None, "page_cache_dropped": True,
    }  # fmt: skip
    record = cell_record(_head(knobs), [answer], notes)
    # What was used is counted by layer; a made-up number need not be one that layers have.
    record["metrics"]["distinct_expert_bytes"]["median"] = used * made["expert_bytes"]
    return record


def failed(**knobs: Any) -> Record:
    """Return the record of a cell that needs more memory than it may take."""
    error = {"kind": "budget", "message": "it needs 5 GiB", "hint": "raise --cpu-memory", "exit_code": 6}
    return {"schema_version": SCHEMA_VERSION, "status": "failed", **_head(knobs), "error": error}


def _head(knobs: dict[str, Any]) -> Record:
    environment = {
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"switchrun": "0.1.0"},
        "cpu": "A processor",
        "cores": 2,
        "memory_bytes": 64 * GIB,
        "available_memory_bytes": 60 * GIB,
        "disk": {"number": "8:1", "name": "vda", "model": None, "filesystem": "ext4"},
        "kernel": "6.1",
    }
    cell = Cell("/models/switch-c", repeats=1)
    return {"knobs": asdict(cell) | knobs, "environment": environment, "synthetic": None}
