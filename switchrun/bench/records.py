"""Records: what the processes answered, made into metrics; comparison with earlier records."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from switchrun.errors import UsageError
from switchrun.units import format_bytes

SCHEMA_VERSION = 2

#: Samples whose range is more than this share of their median are called noisy.
NOISE = 0.2

#: Stands in the note of a record whose reads may have taken no time.
SPARSE = "sparse files"

Record = dict[str, Any]
Summary = dict[str, Any]

_STAGES = ("encoder", "decoder")
#: Settings that do not change what is measured.
_NOT_COMPARED = ("repeats", "warmup")


def cell_record(head: Record, answers: Sequence[Any], notes: Sequence[str] = ()) -> Record:
    """Return the record of a cell from its processes' answers; `head` is what it has in any case."""
    fills = [fill for answer in answers for fill in answer["fills"]]
    plan = answers[0]["plan"]
    rows = [fill_metrics(fill, head["knobs"], plan) for fill in fills]
    metrics: dict[str, Summary | None] = {
        "open_seconds": summarise([answer["open_seconds"] for answer in answers]),
        "open_io_read_bytes": summarise([answer["open_io_read_bytes"] for answer in answers]),
        "open_hub_bytes": summarise([_hub(answer.get("open_hub"))["bytes"] for answer in answers]),
        **{name: summarise([row[name] for row in rows]) for name in rows[0]},
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "ok",
        **head,
        "plan": plan,
        "metrics": metrics,
        "output_ids": fills[0]["output_ids"],
        "expert_use": fills[0]["expert_use"],
        "memory_timeline": answers[0]["timeline"],
        "comparison": None,
        "notes": [*notes, *_notes(metrics, answers)],
    }


def fill_metrics(fill: Any, knobs: Record, plan: Record) -> dict[str, float | None]:
    """Return the figures of one fill of an answer, by name; `knobs` are the cell's settings."""
    encoder, decoder = (fill["stages"][stage] for stage in _STAGES)
    counters, gpus = (
        {name: encoder[kind][name] + decoder[kind][name] for name in encoder[kind]} for kind in ("counters", "gpus")
    )
    steps = [later - earlier for earlier, later in pairwise(fill["token_seconds"])]
    inside = encoder["expert_layer_seconds"] + decoder["expert_layer_seconds"]
    used = sum(len(experts) for experts in fill["expert_use"].values())
    row: dict[str, float | None] = {
        "fill_seconds": fill["seconds"],
        "ttft_seconds": fill["token_seconds"][0],
        "itl_seconds": statistics.median(steps) if steps else None,
        "itl_p95_seconds": percentile(steps, 0.95),
        "decoder_tokens_per_second": knobs["batch_size"] * knobs["output_tokens"] / decoder["seconds"],
        "sequences_per_second": knobs["batch_size"] / fill["seconds"],
        "expert_requests": counters["requests"],
        "hit_rate": divide(counters["hits"], counters["requests"]),
        "gpu_hit_rate": divide(gpus["hits"], gpus["requests"]),
        "gpu_load_bytes": gpus["load_bytes"] if gpus["requests"] else None,
        "expert_loads": counters["loads"],
        "load_bytes": counters["load_bytes"],
        "hub_loads": counters["hub_loads"] if fill.get("hub") else None,
        **{f"hub_{name}": count for name, count in _hub(fill.get("hub")).items()},
        "distinct_expert_bytes": used * plan["expert_bytes"],
        "io_read_bytes": fill["io_read_bytes"],
        "wait_seconds": counters["wait_seconds"],
        "expert_seconds": inside - counters["wait_seconds"],
        "dense_seconds": fill["seconds"] - inside,
        "peak_rss_bytes": fill["peak_rss_bytes"],
        "peak_gpu_bytes": fill["peak_gpu_bytes"],
    }
    for stage in _STAGES:
        times = fill["stages"][stage]
        read = times["counters"]["load_bytes"]
        achieved = divide((read - times["counters"].get("hub_bytes", 0)) or None, times["seconds"])
        raw = max((way[stage] for way in fill["raw"] if way[stage]), default=None)
        row |= {
            f"{stage}_seconds": times["seconds"],
            f"{stage}_load_bytes": read,
            f"{stage}_bytes_per_second": achieved,
            f"{stage}_raw_bytes_per_second": raw,
            f"{stage}_ratio": divide(achieved, raw),
        }
    return row


def _hub(counts: Record | None) -> dict[str, float | None]:
    return counts or dict.fromkeys(("bytes", "requests", "retries"))


def _notes(metrics: Mapping[str, Summary | None], answers: Sequence[Any]) -> list[str]:
    notes = []
    if any(answer["page_cache_dropped"] is False for answer in answers):
        notes.append("parts of the checkpoint stayed in the page cache: not all reads were cold")
    notes += dict.fromkeys(warning for answer in answers for warning in answer["warnings"])
    spread = noisy(metrics)
    if spread:
        notes.append(f"noisy, the samples differ by more than 20 %: {', '.join(spread)}")
    return notes


def summarise(samples: Sequence[float | None]) -> Summary | None:
    """Return median, minimum, maximum and the samples themselves; None if nothing was measured."""
    known = [sample for sample in samples if sample is not None]
    if not known:
        return None
    return {"median": statistics.median(known), "min": min(known), "max": max(known), "samples": known}


def median(record: Record, name: str) -> float:
    """Return a metric's median, 0 if it was not measured."""
    summary = record["metrics"].get(name)
    return float(summary["median"]) if summary else 0.0


def label(record: Record) -> str:
    """Return what tells a cell from the others: `int8, 4 GiB, batch 8`."""
    knobs = record["knobs"]
    dtype = record["plan"]["dtype"] if record["status"] == "ok" else knobs["dtype"]
    memory = [] if knobs["cpu_memory_bytes"] is None else [format_bytes(knobs["cpu_memory_bytes"])]
    return ", ".join([dtype, *memory, f"batch {knobs['batch_size']}"])


def failure(record: Record) -> str:
    """Return why a cell failed, and what to do."""
    error = record["error"]
    return f"{error['message']} ({error['hint']})" if error["hint"] else str(error["message"])


def percentile(samples: Sequence[float], share: float) -> float | None:
    """Return the value below which a share (0 to 1) of the samples lies, interpolated; None without samples."""
    if not samples:
        return None
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def divide(upper: float | None, lower: float | None) -> float | None:
    """Return a ratio; None where it has none."""
    return upper / lower if upper is not None and lower else None


def noisy(metrics: Mapping[str, Summary | None]) -> list[str]:
    """Name the times and rates whose samples are too far apart."""
    return [
        name
        for name, summary in metrics.items()
        if summary
        and name.endswith(("seconds", "per_second"))
        and summary["median"] > 0
        and (summary["max"] - summary["min"]) / summary["median"] > NOISE
    ]


def compare(records: Sequence[Record], old: Sequence[Record], name: str) -> list[Record]:
    """Put new ÷ old into every record whose cell `old` has with the same settings; `name` is the old file's."""
    before = {_compared_settings(record): record for record in old if record["status"] == "ok"}
    result = []
    for record in records:
        match = before.get(_compared_settings(record))
        if record["status"] == "ok" and match:
            ratios = {
                key: divide(_median(record["metrics"], key), _median(match["metrics"], key))
                for key in record["metrics"]
                if key in match["metrics"]
            }
            record = record | {"comparison": {"with": name, "ratios": ratios}}
        result.append(record)
    return result


def _median(metrics: Mapping[str, Summary | None], name: str) -> float | None:
    summary = metrics[name]
    return None if summary is None else summary["median"]


def _compared_settings(record: Record) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, value) for key, value in record["knobs"].items() if key not in _NOT_COMPARED))


def read_records(path: Path) -> list[Record]:
    """Read records that `--export` or `--resume` wrote, as JSON or JSON lines; a `UsageError` says why not."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    try:
        # A document is indented, so that its first line is no JSON by itself.
        lines = [text] if text.startswith("{\n") else text.splitlines()
        values = [json.loads(line) for line in lines if line.strip()]
        records = [record for value in values for record in value.get("cells", [value])]
        if all({"status", "knobs"} <= record.keys() for record in records):
            if all(record["schema_version"] == SCHEMA_VERSION for record in records):
                return records
            raise UsageError(f"{path} was written by another version of switchrun bench", "measure again")
    except (ValueError, AttributeError, KeyError):
        pass
    raise UsageError(f"{path} holds no records of switchrun bench", "use a .json or .jsonl file that it wrote")
