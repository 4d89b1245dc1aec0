"""The command line inside the test's own process, with a fake session."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from switchrun.cli.app import run
from tests.cli.fakes import FakeSession


@dataclass
class Outcome:
    """What a run of the command line gave."""

    code: int
    stdout: str
    stderr: str
    sessions: list[FakeSession] = field(default_factory=list)


class _Stdin(io.TextIOWrapper):
    def __init__(self, data: bytes, terminal: bool) -> None:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with this; unlike bytes in memory, it has a descriptor
        super().__init__(file, encoding="utf-8")
        self.buffer.write(data)
        self.seek(0)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


class _Stderr(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


Invoke = Callable[..., Outcome]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Give a function that runs the command line with `FakeSession`; keywords `input` (bytes) and `terminal`."""

    def call(*args: str, input: bytes = b"", terminal: bool = False) -> Outcome:  # noqa: A002 - as subprocess
        sessions: list[FakeSession] = []

        def open_session(*arguments: Any) -> FakeSession:
            sessions.append(FakeSession(*arguments))
            return sessions[-1]

        monkeypatch.setattr("switchrun.cli.answering.open_session", open_session)
        monkeypatch.setattr("switchrun.cli.answering.quieten_libraries", lambda: None)
        stdout, stderr = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), _Stderr(terminal)
        with monkeypatch.context() as patch, _Stdin(input, terminal) as stdin:
            patch.setattr(sys, "stdin", stdin)
            patch.setattr(sys, "stdout", stdout)
            patch.setattr(sys, "__stdout__", stdout)
            patch.setattr(sys, "stderr", stderr)
            code = run(list(args))
        return Outcome(code, stdout.buffer.getvalue().decode(), stderr.getvalue(), sessions)

    return call
