"""What doctor found, as a table to read and as a record."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from switchrun import __version__
from switchrun.doctor import Check
from switchrun.output.consoles import make_table, render
from switchrun.units import format_count

SCHEMA_VERSION = 1

#: From good to bad.
_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def render_checks(checks: Sequence[Check]) -> str:
    """Return the checks as lines for stdout, each hint below its finding."""
    table = make_table(f"switchrun {__version__}", "status", "check", "finding", text_columns=3)
    for check in checks:
        finding = check.finding if check.hint is None else f"{check.finding}\n→ {check.hint}"
        table.add_row(Text(check.status, style=_STYLES[check.status]), check.name, finding)
    ok, warnings, failed = (sum(check.status == status for check in checks) for status in _STYLES)
    summary = f"{ok} ok, {format_count(warnings, 'warning')}, {failed} failed"
    return render(sys.stdout, [table, summary])


def checks_record(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the checks as a record; docs/schemas/doctor.schema.json describes it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "switchrun_version": __version__,
        "status": max((check.status for check in checks), key=list(_STYLES).index, default="ok"),
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
