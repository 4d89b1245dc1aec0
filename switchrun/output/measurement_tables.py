"""What `bench` and `eval` measured, to read: tables for a terminal, Markdown, and CSV."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from switchrun.errors import escape, printable
from switchrun.output.sinks import format_record
from switchrun.units import format_bytes, format_count, format_rate, format_seconds

Record = dict[str, Any]


class BenchFormat(StrEnum):
    """What `switchrun bench --format` takes."""

    TABLE = "table"
    MD = "md"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"


@dataclass(frozen=True, slots=True)
class Section:
    """One table: its first columns are text, the others numbers."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text_columns: int = 1


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


def _share(value: float) -> str:
    return f"{value:.1%}"


def _number(value: float) -> str:
    return f"{value:.3g}"


Format = Callable[[float], str]

#: Metric, what it is called, how it is written; in the order of the tables.
METRICS: tuple[tuple[str, str, Format], ...] = (
    ("open_seconds", "open", format_seconds),
    ("open_io_read_bytes", "read while opening", format_bytes),
    ("open_hub_bytes", "from the Hub while opening", format_bytes),
    ("ttft_seconds", "time to first token", format_seconds),
    ("itl_seconds", "inter-token latency", format_seconds),
    ("itl_p95_seconds", "inter-token latency, p95", format_seconds),
    ("fill_seconds", "fill", format_seconds),
    ("decoder_tokens_per_second", "decoder tokens/s", _number),
    ("sequences_per_second", "sequences/s", _number),
    ("expert_requests", "expert requests", _count),
    ("hit_rate", "hit rate", _share),
    ("gpu_hit_rate", "hit rate on GPUs", _share),
    ("gpu_load_bytes", "copied to GPUs", format_bytes),
    ("expert_loads", "expert loads", _count),
    ("load_bytes", "experts read", format_bytes),
    ("hub_loads", "expert loads from the Hub", _count),
    ("hub_bytes", "from the Hub", format_bytes),
    ("hub_requests", "requests to the Hub", _count),
    ("hub_retries", "retries", _count),
    ("distinct_expert_bytes", "experts used, each once", format_bytes),
    ("io_read_bytes", "read, by the system's count", format_bytes),
    ("wait_seconds", "time: waiting for disk", format_seconds),
    ("expert_seconds", "time: computing experts", format_seconds),
    ("dense_seconds", "time: dense and other", format_seconds),
    ("encoder_seconds", "encoder step", format_seconds),
    ("encoder_bytes_per_second", "encoder step: achieved", format_rate),
    ("encoder_raw_bytes_per_second", "encoder step: raw disk", format_rate),
    ("encoder_ratio", "encoder step: achieved ÷ raw", _number),
    ("decoder_seconds", "decoder steps", format_seconds),
    ("decoder_bytes_per_second", "decoder steps: achieved", format_rate),
    ("decoder_raw_bytes_per_second", "decoder steps: raw disk", format_rate),
    ("decoder_ratio", "decoder steps: achieved ÷ raw", _number),
    ("peak_rss_bytes", "peak RSS", format_bytes),
    ("peak_gpu_bytes", "peak GPU memory", format_bytes),
)
_LABELS = {key: label for key, label, _ in METRICS}


def format_records(records: Sequence[Record], style: BenchFormat) -> str:
    """Write records as whole lines in one of the formats."""
    if style is BenchFormat.JSON:
        from switchrun.bench.records import SCHEMA_VERSION

        return format_record({"schema_version": SCHEMA_VERSION, "cells": list(records)}, indent=True)
    if style is BenchFormat.JSONL:
        return "".join(format_record(record, indent=False) for record in records)
    if style is BenchFormat.CSV:
        return _csv(records)
    if style is BenchFormat.MD:
        return "\n".join(_markdown(section) for section in sections(records))
    return _tables(records)


def _tables(records: Sequence[Record]) -> str:
    from switchrun.output.consoles import make_table, render

    parts = []
    for section in sections(records):
        table = make_table(section.title, *section.head, text_columns=section.text_columns)
        table.show_header = any(section.head)
        for row in section.rows:
            table.add_row(*row)
        parts.append(table)
    return render(sys.__stdout__, parts)


def sections(records: Sequence[Record]) -> Iterator[Section]:
    """Yield the tables of some records: an overview if there are several, then each of them."""
    if len(records) > 1:
        yield _overview(records)
    for number, record in enumerate(records, 1):
        yield _about(record, f"Cell {number}" if len(records) > 1 else "Benchmark")
        if record["status"] == "ok":
            yield _metrics(record)
            if record["comparison"]:
                yield _comparison(record)


def _overview(records: Iterable[Record]) -> Section:
    shown = ("open_seconds", "ttft_seconds", "itl_seconds", "fill_seconds", "load_bytes", "peak_rss_bytes")
    formats = {key: style for key, _, style in METRICS}
    rows = []
    for number, record in enumerate(records, 1):
        knobs = record["knobs"]
        memory = "" if knobs["cpu_memory_bytes"] is None else format_bytes(knobs["cpu_memory_bytes"])
        row = [str(number), knobs["dtype"], memory, str(knobs["batch_size"])]
        if record["status"] == "ok":
            row += [_write(formats[key], record["metrics"][key], "median") for key in shown]
        else:
            row += [record["error"]["kind"], *[""] * (len(shown) - 1)]
        rows.append(tuple(row))
    head = ("cell", "dtype", "memory", "batch", "open", "TTFT", "ITL", "fill", "read", "RSS")
    return Section("Cells (medians)", head, rows, text_columns=4)


def _about(record: Record, title: str) -> Section:
    knobs, environment = record["knobs"], record["environment"]
    memory = "auto" if knobs["cpu_memory_bytes"] is None else format_bytes(knobs["cpu_memory_bytes"])
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    disk = ", ".join(str(value) for key, value in environment["disk"].items() if value and key != "number")
    rows = [
        ("model", knobs["model"] or "demo"),
        ("dtype", record["plan"]["dtype"] if record["status"] == "ok" else knobs["dtype"]),
        ("memory", memory),
        ("batch", f"{knobs['batch_size']} × {knobs['input_tokens']} tokens in, {knobs['output_tokens']} out"),
        ("fills", f"{knobs['repeats']} {knobs['cache']}, after {knobs['warmup']} thrown away; seed {knobs['seed']}"),
        ("machine", f"{environment['cpu']}, {environment['cores']} cores, {format_bytes(environment['memory_bytes'])}"),
        ("disk", disk),
        ("versions", versions),
        ("date", environment["date"]),
    ]
    if record["status"] == "ok":
        plan = record["plan"]
        slots = f"{plan['expert_slots']} of {format_bytes(plan['slot_bytes'])}, for {plan['num_experts']} experts"
        rows.insert(3, ("slots", slots))
        rows += [("note", note) for note in record["notes"]]
    else:
        error = record["error"]
        rows.append(("failed", f"{error['message']} ({error['hint']})" if error["hint"] else error["message"]))
        if record["synthetic"]:
            rows.append(("note", record["synthetic"]["note"]))
    return Section(title, ("", ""), rows, text_columns=2)


def _metrics(record: Record) -> Section:
    rows = []
    for key, label, style in METRICS:
        summary = record["metrics"].get(key)
        if summary is not None:
            rows.append((label, *(_write(style, summary, part) for part in ("median", "min", "max"))))
    return Section("Measured", ("metric", "median", "min", "max"), rows)


def _comparison(record: Record) -> Section:
    rows = [
        (_LABELS[key], f"{ratio:.2f} ×")
        for key, ratio in record["comparison"]["ratios"].items()
        if ratio is not None and key in _LABELS
    ]
    return Section(f"Now ÷ {record['comparison']['with']}", ("metric", "ratio"), rows)


def _write(style: Format, summary: Record | None, part: str) -> str:
    return "" if summary is None else style(summary[part])


def _markdown(section: Section) -> str:
    numbers = len(section.head) - section.text_columns
    lines = [f"**{printable(section.title)}**\n", markdown_line(section.head)]
    lines.append(markdown_line(["---"] * section.text_columns + ["---:"] * numbers))
    return "\n".join([*lines, *map(markdown_line, section.rows)]) + "\n"


def markdown_line(cells: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    return f"| {' | '.join(printable(cell).replace('|', chr(92) + '|') for cell in cells)} |"


def _csv(records: Sequence[Record]) -> str:
    rows = []
    for record in records:
        row: dict[str, Any] = {"status": record["status"], "date": record["environment"]["date"], **record["knobs"]}
        row["synthetic"] = json.dumps(record["synthetic"]) if record["synthetic"] else None
        for key, summary in record.get("metrics", {}).items():
            row |= {f"{key}.{part}": summary and summary[part] for part in ("median", "min", "max")}
        row["error"] = record["error"]["message"] if record["status"] == "failed" else None
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: escape(value) if isinstance(value, str) else value for name, value in row.items()} for row in rows
    )
    return text.getvalue()


_HEAD = ("dtype", "loss", "± loss", "same tokens", "same outputs", "experts read", "time", "peak RSS", "slots")
_NOTHING = "–"


class EvalFormat(StrEnum):
    """What `switchrun eval --format` takes."""

    TABLE = "table"
    MD = "md"
    JSON = "json"


def format_evaluation(record: dict[str, Any], style: EvalFormat) -> str:
    """Write an evaluation as whole lines in one of the formats."""
    if style is EvalFormat.JSON:
        return format_record(record, indent=True)
    title = printable(f"Span-corruption loss, {record['model']['id']}")
    if style is EvalFormat.MD:
        lines = [f"### {title}", "", markdown_line(_HEAD), markdown_line(["---"] + ["---:"] * (len(_HEAD) - 1))]
        lines += [markdown_line(row) for row in _rows(record)]
        return "\n".join([*lines, "", *(f"- {printable(note)}" for note in _notes(record)), ""])
    from switchrun.output.consoles import make_table, render

    table = make_table(title, *_HEAD)
    for row in _rows(record):
        table.add_row(*row)
    return render(sys.__stdout__, [table, "\n".join(_notes(record))])


def _rows(record: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in record["rows"]:
        if row["status"] == "failed":
            yield (row["name"], "failed", *[_NOTHING] * (len(_HEAD) - 2))
            continue
        parts = [row["loss_pass"], *([row["generation"]] if row["generation"] else [])]
        difference = row["loss_difference"]
        yield (
            row["name"],
            f"{row['loss']:.4f}",
            _NOTHING if difference is None else f"{difference:+.4f}",
            _agreement(row["token_agreement"]),
            _agreement(row["output_agreement"]),
            format_bytes(sum(part["load_bytes"] for part in parts)),
            format_seconds(sum(part["seconds"] for part in parts)),
            format_bytes(row["peak_rss_bytes"]),
            str(row["expert_slots"]),
        )


def _notes(record: dict[str, Any]) -> Iterator[str]:
    """Yield what the columns are about, and whatever was left out."""
    text = record["text"]
    passages = format_count(text["passages"], "passage")
    yield f"{passages}, {format_count(text['target_tokens'], 'target token')}; loss in nats per target token"
    other = record["reference_model"]
    reference = record["reference"] if other is None else f"{other['id']} ({other['stored_dtype']})"
    yield f"reference {reference}, seed {record['seed']}"
    for row in record["rows"]:
        if row["status"] == "failed":
            yield f"{row['name']}: {row['error']['message']}"
            continue
        passes = format_count(row["passes"], "pass", "passes")
        yield (
            f"{row['name']}: {passes}, {format_bytes(row['hidden_bytes'])} of hidden states, "
            f"{format_count(row['experts_used'], 'expert')} used, {row['loss_pass']['expert_loads']} read for the loss"
        )


def _agreement(share: float | None) -> str:
    return _NOTHING if share is None else _share(share)
