"""Records: what the processes answered, made into metrics; comparison with earlier records."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from switchrun.bench.statistics import Summary, divide, noisy, percentile, summarise
from switchrun.errors import UsageError

SCHEMA_VERSION = 1

Record = dict[str, Any]

_STAGES = ("encoder", "decoder")
#: Settings that do not change what is measured.
_NOT_COMPARED = ("repeats", "warmup", "baseline")


def failed_record(head: Record, error: Record) -> Record:
    """Give the record of a cell that could not be measured."""
    return {"schema_version": SCHEMA_VERSION, "status": "failed", **head, "error": error}


def cell_record(head: Record, answers: Sequence[Any], beside: Sequence[Any], obstacle: Record | None) -> Record:
    """Give the record of a cell.

    Args:
        head: What it has whatever becomes of it: knobs, environment, synthetic.
        answers: Of the measuring processes.
        beside: Of the baseline's processes.
        obstacle: What kept the baseline from running, or from going on.
    """
    knobs = head["knobs"]
    fills = [fill for answer in answers for fill in answer["fills"]]
    best = {stage: _best_way(fills, stage) for stage in _STAGES}
    plan = answers[0]["plan"]
    rows = [_fill_metrics(fill, knobs, plan, best) for fill in fills]
    metrics: dict[str, Summary | None] = {
        "open_seconds": summarise([answer["open_seconds"] for answer in answers]),
        "open_io_read_bytes": summarise([answer["open_io_read_bytes"] for answer in answers]),
        **{name: summarise([row[name] for row in rows]) for name in rows[0]},
    }
    record = {
        "schema_version": SCHEMA_VERSION,
        "status": "ok",
        **head,
        "plan": plan,
        "metrics": metrics,
        "raw_disk": _raw_disk(fills, best),
        "output_ids": fills[0]["output_ids"],
        "expert_use": fills[0]["expert_use"],
        "memory_timeline": answers[0]["timeline"],
        "baseline": None,
        "comparison": None,
    }
    if knobs["baseline"] is not None:
        record["baseline"] = _baseline(record, beside, obstacle)
    return record | {"notes": _notes(record, answers)}


def _fill_metrics(fill: Any, knobs: Record, plan: Record, best: Mapping[str, int | None]) -> dict[str, float | None]:
    encoder, decoder = (fill["stages"][stage] for stage in _STAGES)
    counters, gpus = (
        {name: encoder[kind][name] + decoder[kind][name] for name in encoder[kind]} for kind in ("counters", "gpus")
    )
    has_gpu = gpus["requests"] > 0
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
        "gpu_load_bytes": gpus["load_bytes"] if has_gpu else None,
        "expert_loads": counters["loads"],
        "load_bytes": counters["load_bytes"],
        "distinct_expert_bytes": used * plan["expert_bytes"],
        "io_read_bytes": fill["io_read_bytes"],
        "wait_seconds": counters["wait_seconds"],
        "expert_seconds": inside - counters["wait_seconds"],
        "dense_seconds": fill["seconds"] - inside,
        "peak_rss_bytes": fill["peak_rss_bytes"],
        "peak_gpu_bytes": fill["peak_gpu_bytes"],
        "peak_group_bytes": fill["peak_group_bytes"],
    }
    read_seconds = 0.0
    for stage in _STAGES:
        times = fill["stages"][stage]
        row |= _stage_metrics(stage, times, _raw(fill, stage, best[stage]))
        read_seconds += divide(times["counters"]["load_bytes"], _raw(fill, stage, best[stage])) or 0.0
    row["compute_seconds"] = compute = fill["compute"]["seconds"]
    row["ideal_seconds"] = read_seconds + compute
    row["ideal_ratio"] = divide(fill["seconds"], row["ideal_seconds"])
    second = fill["second_pass"]
    row["second_pass_seconds"] = second["seconds"] if second else None
    row["first_pass_ratio"] = second["seconds"] / fill["seconds"] if second else None
    return row


def _stage_metrics(stage: str, times: Any, raw: float | None) -> dict[str, float | None]:
    counters = times["counters"]
    read = counters["load_bytes"] or None
    overall, reading = divide(read, times["seconds"]), divide(read, counters["load_seconds"])
    return {
        f"{stage}_seconds": times["seconds"],
        f"{stage}_wait_seconds": counters["wait_seconds"],
        f"{stage}_load_bytes": counters["load_bytes"],
        f"{stage}_bytes_per_second": overall,
        f"{stage}_reading_bytes_per_second": reading,
        f"{stage}_raw_bytes_per_second": raw,
        f"{stage}_ratio": divide(overall, raw),
        f"{stage}_reading_ratio": divide(reading, raw),
    }


def _raw(fill: Any, stage: str, way: int | None) -> float | None:
    """Give what the disk gave to the way of that number, when this fill's reads were replayed."""
    if way is None:
        return None
    rate: float | None = _in_order(fill)[way][stage]
    return rate


def _in_order(fill: Any) -> list[Any]:
    """Give the ways in one order for all fills: each fill tried them in another."""
    return sorted(fill["raw"], key=lambda way: (not way["direct"], way["threads"], way["chunk_bytes"]))


def _best_way(fills: Sequence[Any], stage: str) -> int | None:
    medians = []
    for number in range(len(fills[0]["raw"])):
        summary = summarise([_in_order(fill)[number][stage] for fill in fills])
        medians.append((summary["median"] if summary else 0.0, number))
    rate, number = max(medians)
    return number if rate else None


def _raw_disk(fills: Sequence[Any], best: Mapping[str, int | None]) -> list[Record]:
    ways = []
    for number, way in enumerate(_in_order(fills[0])):
        ways.append(
            {
                "threads": way["threads"],
                "chunk_bytes": way["chunk_bytes"],
                "direct": way["direct"],
                **{
                    f"{stage}_bytes_per_second": summarise([_in_order(fill)[number][stage] for fill in fills])
                    for stage in _STAGES
                },
                "best_for": [stage for stage in _STAGES if best[stage] == number],
            }
        )
    return ways


def _baseline(record: Record, answers: Sequence[Any], obstacle: Record | None) -> Record:
    """Give what the baseline took, and its figures ÷ ours: 4 means that it took four times as much."""
    name = record["knobs"]["baseline"]
    fills = [fill for answer in answers for fill in answer["fills"]]
    if not fills:
        return {"name": name, "status": "failed", "error": obstacle, "metrics": None, "ratios": None}
    metrics = {
        "open_seconds": summarise([answer["open_seconds"] for answer in answers]),
        "open_io_read_bytes": summarise([answer["open_io_read_bytes"] for answer in answers]),
        "fill_seconds": summarise([fill["seconds"] for fill in fills]),
        "io_read_bytes": summarise([fill["io_read_bytes"] for fill in fills]),
        "peak_rss_bytes": summarise([fill["peak_rss_bytes"] for fill in fills]),
        "peak_group_bytes": summarise([fill["peak_group_bytes"] for fill in fills]),
    }
    sums = {"open_and_fill_seconds": ("open_seconds", "fill_seconds")}
    sums["all_read_bytes"] = ("open_io_read_bytes", "io_read_bytes")
    ratios = {key: divide(_median(metrics, key), _median(record["metrics"], key)) for key in metrics}
    for key, parts in sums.items():
        both = [[_median(source, part) for part in parts] for source in (metrics, record["metrics"])]
        ratios[key] = divide(*(None if None in values else sum(filter(None, values)) for values in both))
    return {
        "name": name,
        "status": "ok",
        "error": obstacle,
        "metrics": metrics,
        "ratios": ratios,
        "same_tokens": fills[0]["output_ids"] == record["output_ids"],
    }


def _median(metrics: Mapping[str, Summary | None], name: str) -> float | None:
    summary = metrics[name]
    return None if summary is None else summary["median"]


def _notes(record: Record, answers: Sequence[Any]) -> list[str]:
    notes = []
    if record["synthetic"]:
        notes.append(record["synthetic"]["note"])
    if any(answer["page_cache_dropped"] is False for answer in answers):
        notes.append("parts of the checkpoint stayed in the page cache: not all reads were cold")
    notes += dict.fromkeys(warning for answer in answers for warning in answer["warnings"])
    spread = noisy(record["metrics"])
    if spread:
        notes.append(f"noisy, the samples differ by more than 20 %: {', '.join(spread)}")
    return notes


def compare(records: Sequence[Record], old: Sequence[Record], name: str) -> list[Record]:
    """Put new ÷ old into every record whose cell was measured before, with the same settings.

    Args:
        records: The new ones.
        old: The earlier ones.
        name: What the earlier ones are called.
    """
    before = {_settings(record): record for record in old if record["status"] == "ok"}
    result = []
    for record in records:
        match = before.get(_settings(record))
        if record["status"] == "ok" and match:
            ratios = {
                key: divide(_median(record["metrics"], key), _median(match["metrics"], key))
                for key in record["metrics"]
                if key in match["metrics"]
            }
            record = record | {"comparison": {"with": name, "ratios": ratios}}
        result.append(record)
    return result


def _settings(record: Record) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, value) for key, value in record["knobs"].items() if key not in _NOT_COMPARED))


def read_records(path: Path) -> list[Record]:
    """Read records that `--export` or `--resume` wrote, as JSON or JSON lines.

    Raises:
        UsageError: The file is not there, or holds something else.
    """
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
            return records
    except (ValueError, AttributeError):
        pass
    raise UsageError(f"{path} holds no records of switchrun bench", "use a .json or .jsonl file that it wrote")
