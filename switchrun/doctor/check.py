"""What a check finds, and the exit code that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from switchrun.errors import SwitchrunError

#: What is wrong, and what to do about it.
Problem = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at, and how it is.

    Attributes:
        name: What was looked at; a heading of docs/doctor.md.
        finding: What was found, in one line.
        hint: What to do about it; None if all is well.
        error: What a command would end with; None if it works, but slower or not as expected.
        details: Figures that a program may act on; docs/schemas/doctor.schema.json describes each.
    """

    name: str
    finding: str
    hint: str | None = None
    error: type[SwitchrunError] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> Literal["ok", "warn", "fail"]:
        """How it is."""
        return "fail" if self.error else "warn" if self.hint else "ok"

    @property
    def exit_code(self) -> int:
        """That of the error; 0 without one."""
        return self.error.exit_code if self.error else 0
