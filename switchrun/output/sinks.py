"""The formats of an answer: each gives whole lines, ready to be written to stdout."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchrun import __version__
from switchrun.errors import OBEYED, InputError, escape
from switchrun.model.records import SCHEMA_VERSION, Alternative, FillResult, GenerateResult, ScoreResult, Span
from switchrun.model.sentinels import fill_in

if TYPE_CHECKING:
    from switchrun.doctor import Check
    from switchrun.store import StoreInfo

STORES_SCHEMA_VERSION = 1
DOCTOR_SCHEMA_VERSION = 1

_LINE_BREAK = re.compile(r"\r\n|\r|\n")
#: Around what was filled in: bold and green.
_BEGIN_SPAN, _END_SPAN = "\x1b[1;32m", "\x1b[0m"


class FillFormat(StrEnum):
    """What `--format` takes where texts are answered."""

    TEXT = "text"
    RAW = "raw"
    JSON = "json"
    JSONL = "jsonl"


class ScoreFormat(StrEnum):
    """What `switchrun score --format` takes."""

    TEXT = "text"
    JSON = "json"
    JSONL = "jsonl"


def format_result(
    result: GenerateResult | ScoreResult, style: FillFormat, lines: int = 1, *, colours: bool = False
) -> str:
    """Write an answer as whole lines; so many, except in `json` and `jsonl`.

    Alternatives have a line each, with the log-probability before it; where they are fewer, empty lines follow.
    A score's line has the log-probability of all, the text filled in, and each span's log-probability, with tabs
    between. With `colours`, what was filled in is coloured in `text`.
    """
    if style in (FillFormat.JSON, FillFormat.JSONL):
        return format_record(result.as_record(), indent=style is FillFormat.JSON)

    def shown(answer: FillResult | Alternative | ScoreResult) -> str:
        if style is FillFormat.RAW and not isinstance(answer, ScoreResult):
            return _flat(answer.raw)
        return _coloured(result.input, answer.spans) if colours else _flat(answer.text)

    if isinstance(result, ScoreResult):
        spans = ("" if span.log_probability is None else f"{span.log_probability:.4f}" for span in result.spans)
        return _columns(f"{result.log_probability:.4f}", shown(result), *spans)
    if not isinstance(result, FillResult):
        return one_line(result.text if style is FillFormat.TEXT else result.raw)
    if result.alternatives is None:
        return shown(result) + "\n"
    answers = (_columns(f"{each.log_probability:.4f}", shown(each)) for each in result.alternatives)
    return "".join(answers) + "\n" * (lines - len(result.alternatives))


def _coloured(text: str, spans: Sequence[Span]) -> str:
    """Put spans into a text, on one line without codes that a terminal would obey, but for those of the colour."""
    return fill_in(
        _flat(text),
        [
            replace(span, text=f"{_BEGIN_SPAN}{_flat(span.text)}{_END_SPAN}" if span.text else span.text)
            for span in spans
        ],
    )


def format_failure(position: int, text: str, error: InputError, style: FillFormat, lines: int = 1) -> str:
    """Write what stands in the place of an answer that could not be given.

    For `text` and `raw` these are empty lines, so that line n of the output still belongs to line n of the input.
    """
    if style in (FillFormat.TEXT, FillFormat.RAW):
        return "\n" * lines
    record = {
        "schema_version": SCHEMA_VERSION,
        "id": position,
        "input": text,
        "error": {"kind": error.kind, "message": error.message, "hint": error.hint},
    }
    return format_record(record, indent=style is FillFormat.JSON)


def format_record(record: dict[str, Any], *, indent: bool) -> str:
    """Write a record as JSON in UTF-8, indented or on one line, with a newline at the end.

    What `escape` would write out is escaped as JSON does it.
    """
    text = json.dumps(record, ensure_ascii=False, allow_nan=False, indent=2 if indent else None)
    # Outside of strings there is none, and inside json.dumps has written the first 32 codes out already.
    return OBEYED.sub(lambda code: f"\\u{ord(code[0]):04x}", text) + "\n"


def stores_record(offload: Path, stores: Iterable[StoreInfo]) -> dict[str, Any]:
    """Return the stores as a record; docs/schemas/offload.schema.json describes it."""
    return {
        "schema_version": STORES_SCHEMA_VERSION,
        "offload_folder": str(offload),
        "stores": [
            {
                "folder": str(info.folder),
                "model": info.manifest.model if info.manifest else None,
                "fingerprint": info.manifest.fingerprint if info.manifest else None,
                "dtype": info.folder.name,
                "num_experts": info.experts,
                "total_bytes": info.nbytes,
                "problem": info.problem or None,
            }
            for info in stores
        ],
    }


def checks_record(checks: Sequence[Check]) -> dict[str, Any]:
    """Return doctor's checks as a record; docs/schemas/doctor.schema.json describes it."""
    return {
        "schema_version": DOCTOR_SCHEMA_VERSION,
        "switchrun_version": __version__,
        "status": max((check.status for check in checks), key=("ok", "warn", "fail").index, default="ok"),
        "exit_code": next((check.exit_code for check in checks if check.exit_code), 0),
        "checks": [
            {
                "name": check.name,
                "status": check.status,
                "finding": check.finding,
                "hint": check.hint,
                "exit_code": check.exit_code,
                "details": dict(check.details),
            }
            for check in checks
        ],
    }


def _columns(*texts: str) -> str:
    """Return texts that are flat already as one line, with tabs between them and nowhere else."""
    return "\t".join(text.replace("\t", " ") for text in texts) + "\n"


def one_line(text: str) -> str:
    """Write a text as one line, without codes that a terminal would obey."""
    return _flat(text) + "\n"


def _flat(text: str) -> str:
    return escape(_LINE_BREAK.sub(" ", text))
