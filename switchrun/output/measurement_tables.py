"""What `bench` and `eval` measured, to read: tables for a terminal, Markdown, and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
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


Format = Callable[[float], str]

#: Metric, what it is called, how it is written; in the order of the tables.
METRICS: tuple[tuple[str, str, Format], ...] = (
    ("open_seconds", "time to open", format_seconds),
    ("open_io_read_bytes", "read while opening", format_bytes),
    ("open_hub_bytes", "from the Hub while opening", format_bytes),
    ("ttft_seconds", "time to first token", format_seconds),
    ("itl_seconds", "time per token", format_seconds),
    ("itl_p95_seconds", "time per token (95th percentile)", format_seconds),
    ("fill_seconds", "time of a fill", format_seconds),
    ("decoder_tokens_per_second", "tokens generated", "{:.3g}/s".format),
    ("sequences_per_second", "inputs filled", "{:.3g}/s".format),
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
    ("wait_seconds", "waiting for experts", format_seconds),
    ("expert_seconds", "computing experts", format_seconds),
    ("dense_seconds", "all else of a fill", format_seconds),
    ("encoder_seconds", "encoder step", format_seconds),
    ("encoder_bytes_per_second", "encoder step: achieved", format_rate),
    ("encoder_raw_bytes_per_second", "encoder step: raw disk", format_rate),
    ("encoder_ratio", "encoder step: achieved of raw", _share),
    ("decoder_seconds", "decoder steps", format_seconds),
    ("decoder_bytes_per_second", "decoder steps: achieved", format_rate),
    ("decoder_raw_bytes_per_second", "decoder steps: raw disk", format_rate),
    ("decoder_ratio", "decoder steps: achieved of raw", _share),
    ("peak_rss_bytes", "peak memory", format_bytes),
    ("peak_gpu_bytes", "peak GPU memory", format_bytes),
)
_LABELS = {key: label for key, label, _ in METRICS}
#: What the summary has of them.
_SUMMARY = (
    "open_seconds", "ttft_seconds", "itl_seconds", "fill_seconds", "sequences_per_second", "hit_rate", "load_bytes",
    "hub_bytes", "wait_seconds", "peak_rss_bytes", "peak_gpu_bytes",
)  # fmt: skip
_NOTHING = "–"


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
        words = [printable(line) + "\n" for line in closing(records)]
        return "\n".join([*map(_markdown, sections(records)), *words])
    return _tables(records)


def _tables(records: Sequence[Record]) -> str:
    from switchrun.output.consoles import make_table, render, whole

    parts = []
    for section in sections(records):
        table = make_table(section.title, *section.head, text_columns=section.text_columns)
        for name, *values in section.rows:
            table.add_row(name, *(map(whole, values) if name == "model" else values))
        parts.append(table)
    return render(sys.__stdout__, [*parts, *closing(records)])


def sections(records: Sequence[Record]) -> Iterator[Section]:
    """Yield the tables of some records: what they share, then each of them, then the summary."""
    shared = shared_facts(records)
    yield shared
    for number, record in enumerate(records, 1):
        yield from cell_sections(record, shared, f" in cell {number}" if len(records) > 1 else "")
    yield summary(records)


def shared_facts(records: Sequence[Record]) -> Section:
    """Return the settings, and what was measured on, that are the same for all records."""
    first, *others = [list(_facts(record)) for record in records]
    return Section("Benchmark", ("", ""), [row for row in first if all(row in rows for rows in others)], text_columns=2)


def cell_sections(record: Record, shared: Section, which: str = "") -> Iterator[Section]:
    """Yield the tables of one record, without what it shares with others; `which` stands in their titles."""
    own = [row for row in _facts(record) if row not in shared.rows]
    if own:
        yield Section(f"Settings{which}", ("", ""), own, text_columns=2)
    if record["status"] == "ok":
        yield _metrics(record, f"Measured{which}")
        if record["comparison"]:
            yield _comparison(record)


def summary(records: Sequence[Record]) -> Section:
    """Return the most important figures: one a row, and a column for each record."""
    columns = [_column(record, len(records) > 1) for record in records]
    names = dict.fromkeys(name for column in sorted(columns, key=len, reverse=True) for name in column)
    rows = [(name, *(column.get(name, _NOTHING) for column in columns)) for name in names]
    numbers = [f"cell {number}" for number in range(1, len(records) + 1)] if len(records) > 1 else ["median"]
    return Section("Summary (medians)" if len(records) > 1 else "Summary", ("", *numbers), rows)


def _column(record: Record, several: bool) -> dict[str, str]:
    knobs = record["knobs"]
    column = {"dtype": record["plan"]["dtype"] if record["status"] == "ok" else knobs["dtype"]} if several else {}
    if several and knobs["cpu_memory_bytes"] is not None:
        column["memory"] = format_bytes(knobs["cpu_memory_bytes"])
    if several:
        column["batch"] = str(knobs["batch_size"])
    if record["status"] == "failed":
        return column | {_LABELS[_SUMMARY[0]]: "failed"}
    formats = {key: style for key, _, style in METRICS}
    medians = {key: record["metrics"].get(key) for key in _SUMMARY}
    return column | {_LABELS[key]: formats[key](each["median"]) for key, each in medians.items() if each}


def closing(records: Sequence[Record]) -> list[str]:
    """Return the last lines: which cells failed and why, and what limits the fastest."""
    from switchrun.bench.records import failure
    from switchrun.bench.verdict import verdict

    failed = [(number, record) for number, record in enumerate(records, 1) if record["status"] == "failed"]
    lines = [f"Cell {number} failed: {failure(record)}" for number, record in failed if len(records) > 1]
    return [*lines, verdict(records)]


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    knobs, environment = record["knobs"], record["environment"]
    measured = record["status"] == "ok"
    yield "model", knobs["model"] or "demo"
    yield "dtype", record["plan"]["dtype"] if measured else knobs["dtype"]
    yield "memory", "auto" if knobs["cpu_memory_bytes"] is None else format_bytes(knobs["cpu_memory_bytes"])
    if knobs["gpu_memory"] is not None:
        yield "GPU memory", knobs["gpu_memory"]
    if measured:
        plan = record["plan"]
        yield (
            "slots",
            f"{plan['expert_slots']} of {format_bytes(plan['slot_bytes'])}, for {plan['num_experts']} experts",
        )
    yield "batch", format_count(knobs["batch_size"], "input")
    yield "tokens", f"{knobs['input_tokens']} in, {knobs['output_tokens']} out"
    yield "fills", f"{knobs['repeats']} {knobs['cache']}, after {knobs['warmup']} thrown away; seed {knobs['seed']}"
    memory = format_bytes(environment["memory_bytes"])
    yield "machine", f"{environment['cpu']}, {format_count(environment['cores'], 'core')}, {memory}"
    yield "disk", ", ".join(str(value) for key, value in environment["disk"].items() if value and key != "number")
    yield "versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    yield "date", environment["date"]
    notes = record["notes"] if measured else [record["synthetic"]["note"]] if record["synthetic"] else []
    for note in notes:
        # Those of noise name metrics.
        yield "note", re.sub(r"\w+", lambda word: _LABELS.get(word[0], word[0]), note)
    if not measured:
        from switchrun.bench.records import failure

        yield "failed", failure(record)


def _metrics(record: Record, title: str) -> Section:
    rows = []
    for key, label, style in METRICS:
        samples = record["metrics"].get(key)
        if samples is not None:
            rows.append((label, *(style(samples[part]) for part in ("median", "min", "max"))))
    return Section(title, ("metric", "median", "min", "max"), rows)


def _comparison(record: Record) -> Section:
    rows = [
        (_LABELS[key], f"{ratio:.2f} ×")
        for key, ratio in record["comparison"]["ratios"].items()
        if ratio is not None and key in _LABELS
    ]
    return Section(f"Now ÷ {record['comparison']['with']}", ("metric", "ratio"), rows)


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


_HEAD = ("dtype", "loss", "± loss", "same tokens", "same outputs", "experts read", "time", "peak memory", "slots")


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
