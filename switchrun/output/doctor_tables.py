"""What doctor found, as a table to read and as a record."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from switchrun import __version__
from switchrun.doctor import Check, Status, exit_code, worst
from switchrun.output.consoles import make_table, render

SCHEMA_VERSION = 1

_STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


def render_checks(checks: Sequence[Check]) -> str:
    """Give the checks as lines for stdout, each mend below what it mends."""
    table = make_table(f"switchrun {__version__}", "status", "check", "finding", text_columns=3)
    for check in checks:
        finding = check.finding if check.mend is None else f"{check.finding}\n→ {check.mend}"
        table.add_row(Text(check.status, style=_STYLES[check.status]), check.name, finding)
    return render(sys.stdout, [table, _summary(checks)])


def checks_record(checks: Sequence[Check]) -> dict[str, Any]:
    """Give the checks as a record; docs/schemas/doctor.schema.json describes it."""
    return {
        "schema_version": SCHEMA_VERSION,
        "switchrun_version": __version__,
        "status": worst(checks).value,
        "exit_code": exit_code(checks),
        "checks": [
            {
                "name": check.name,
                "status": check.status.value,
                "finding": check.finding,
                "mend": check.mend,
                "exit_code": check.exit_code,
                "details": dict(check.details),
            }
            for check in checks
        ],
    }


def _summary(checks: Sequence[Check]) -> str:
    counts = {status: sum(check.status is status for check in checks) for status in Status}
    warnings = "warning" if counts[Status.WARN] == 1 else "warnings"
    return f"{counts[Status.OK]} ok, {counts[Status.WARN]} {warnings}, {counts[Status.FAIL]} failed"
