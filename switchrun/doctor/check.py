"""What a check finds, and what that means for the exit code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from switchrun.errors import SwitchrunError


class Status(StrEnum):
    """How it is, from good to bad."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, and how it is.

    Attributes:
        name: What was looked at; a heading of docs/doctor.md.
        status: `warn`: it works, but slower, less of it, or not as one would think. `fail`: some command will not work.
        finding: What was found, in one line.
        mend: What to do about it; None if nothing is to be done.
        details: Figures for JSON, with the unit in the key; `docs/schemas/doctor.schema.json` describes each.
        exit_code: 0, or if it fails that of the error class that a command would end with.
    """

    name: str
    status: Status
    finding: str
    mend: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    exit_code: int = 0


def passed(name: str, finding: str, **details: Any) -> Check:
    """Give a check that found nothing wrong."""
    return Check(name, Status.OK, finding, None, details)


def warned(name: str, finding: str, mend: str, **details: Any) -> Check:
    """Give a check that found something to know about."""
    return Check(name, Status.WARN, finding, mend, details)


def failed(
    name: str, finding: str, mend: str, error: type[SwitchrunError] | SwitchrunError = SwitchrunError, **details: Any
) -> Check:
    """Give a check that found what will not work; `error` is what a command would end with."""
    return Check(name, Status.FAIL, finding, mend, details, error.exit_code)


def worst(checks: Iterable[Check]) -> Status:
    """Give the worst status of all."""
    return max((check.status for check in checks), key=list(Status).index, default=Status.OK)


def exit_code(checks: Iterable[Check]) -> int:
    """Give the exit code of the first check that fails; 0 if none does."""
    return next((check.exit_code for check in checks if check.status is Status.FAIL), 0)
