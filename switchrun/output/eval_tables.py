"""What `switchrun eval` found: one table to read, in the terminal or as Markdown, and JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from switchrun.output.bench_tables import markdown_line
from switchrun.output.sinks import format_record
from switchrun.units import format_bytes, format_count, format_seconds

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
    title = f"Span-corruption loss, {record['model']['id']}"
    if style is EvalFormat.MD:
        lines = [f"### {title}", "", markdown_line(_HEAD), markdown_line(["---"] + ["---:"] * (len(_HEAD) - 1))]
        lines += [markdown_line(row) for row in _rows(record)]
        return "\n".join([*lines, "", *(f"- {note}" for note in _notes(record)), ""])
    from switchrun.output.consoles import make_table, render

    table = make_table(title, *_HEAD)
    for row in _rows(record):
        table.add_row(*row)
    return render(sys.stdout, [table, "\n".join(_notes(record))])


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
            _share(row["token_agreement"]),
            _share(row["output_agreement"]),
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
    yield f"reference {record['reference']}, seed {record['seed']}"
    for row in record["rows"]:
        if row["status"] == "failed":
            yield f"{row['name']}: {row['error']['message']}"
            continue
        passes = format_count(row["passes"], "pass", "passes")
        yield (
            f"{row['name']}: {passes}, {format_bytes(row['hidden_bytes'])} of hidden states, "
            f"{format_count(row['experts_used'], 'expert')} used, {row['loss_pass']['expert_loads']} read for the loss"
        )


def _share(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.1%}"
