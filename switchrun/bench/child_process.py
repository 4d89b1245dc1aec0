"""Child processes that measure, both ends: one line of JSON in is the task, lines of JSON out. No torch.

The last line is the answer; those before say how far the child is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchrun.errors import SwitchrunError
from switchrun.machine.children import end, start_python
from switchrun.machine.limits import refused_by_system

if TYPE_CHECKING:
    from switchrun.model.engine import Engine
    from switchrun.model.opening import ImportLibraries
    from switchrun.model.records import Progress
    from switchrun.model.reporting import Reporter
    from switchrun.planning.opening import PlannedModel

Task = dict[str, Any]
Answer = dict[str, Any]
#: Takes the fields of a `Progress`; None before there is one.
OnStep = Callable[[Answer | None], None]

#: The process that measures. It belongs to the command line, whose start-up is measured too.
CHILD = "switchrun.cli.child"

_STDERR_LINES = 3
#: How often one looks how far a child is.
_LOOK_SECONDS = 0.5


class ChildError(Exception):
    """A child gave no answer, or an error as its answer.

    Attributes:
        record: How it stands in records: kind, message, hint and exit code.
    """

    def __init__(self, message: str, hint: str = "", kind: str = "crash", exit_code: int = 1) -> None:
        super().__init__(message)
        self.record = {"kind": kind, "message": message, "hint": hint, "exit_code": exit_code}


def as_error(record: dict[str, Any]) -> SwitchrunError:
    """Return the error that a record describes."""
    error = SwitchrunError(record["message"], record["hint"])
    error.exit_code, error.kind = record["exit_code"], record["kind"]
    return error


def run_child(
    module: str,
    task: Task,
    *,
    timeout: float | None = None,
    folder: Path | None = None,
    on_start: Callable[[int], None] = lambda _pid: None,
    on_step: OnStep = lambda _step: None,
) -> Answer:
    """Run a module with a task; blocks until it ends. Whatever happens, the child is gone then.

    Args:
        module: It calls `answer_task`.
        task: Goes to its stdin.
        timeout: Seconds before it is killed.
        folder: Where it runs, and where modules are looked for first; None is here, where none is looked for.
        on_start: Called with the child's process id before the child imports anything large.
        on_step: Called twice a second with how far the child is.

    Raises:
        ChildError: It crashed, was killed, took too long, or answered with an error.
    """
    child = start_python(module, folder=folder, stdin=subprocess.PIPE)
    try:
        on_start(child.pid)
        output, errors = _wait(child, (json.dumps(task) + "\n").encode(), timeout, on_step)
    finally:
        end(child)
    if child.returncode or not output:
        raise _crash(child.returncode, errors.decode("utf-8", "replace"))
    answer: Answer = json.loads(output.rpartition(b"\n")[2])
    if "error" in answer:
        raise ChildError(**answer["error"])
    return answer


def _wait(child: subprocess.Popen[bytes], task: bytes, timeout: float | None, on_step: OnStep) -> tuple[bytes, bytes]:
    """Hand a child its task, and return what it wrote to stdout and stderr once it has ended."""
    start, given = time.monotonic(), task
    while True:
        try:
            return child.communicate(given or None, _LOOK_SECONDS)
        except subprocess.TimeoutExpired as waiting:
            if timeout is not None and time.monotonic() - start > timeout:
                raise ChildError(f"not done after {timeout:.0f} s", "allow more time", "timeout") from None
            given = b""
            complete = (waiting.output or b"").rpartition(b"\n")[0]
            on_step(json.loads(complete.rpartition(b"\n")[2]) if complete else None)


def _crash(code: int, errors: str) -> ChildError:
    if code == -signal.SIGKILL:
        return ChildError("the process was killed (perhaps out of memory)", "lower --cpu-memory", "killed", 6)
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    tail = " | ".join(lines[-_STDERR_LINES:]) or "it said nothing"
    return ChildError(f"the process ended with {code}: {tail}")


def answer_task(work: Callable[[Task, Reporter], Answer]) -> None:
    """Read a task, do it, and write the answer; the child's end. Errors with a reason are answers too.

    The work is given what to report its steps to.
    """
    from switchrun.model.reporting import Reporter

    task = json.loads(sys.stdin.readline())
    # Whatever a library prints must not get into the answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def write(progress: Progress) -> None:
        answers.write(json.dumps(asdict(progress)) + "\n")
        answers.flush()

    try:
        answer = work(task, Reporter(write))
    except Exception as error:
        known = error if isinstance(error, SwitchrunError) else refused_by_system(error)
        if known is None:
            raise
        answer = {"error": ChildError(known.message, known.hint, known.kind, known.exit_code).record}
    with answers:
        json.dump(answer, answers)


@contextmanager
def open_engine(
    planned: PlannedModel, warn: Callable[[str], None], import_libraries: ImportLibraries, report: Reporter
) -> Iterator[Engine]:
    """Open a model without a tokenizer, as `switchrun fill` does: libraries are imported while weights are read."""
    from switchrun.model.opening import fetch_dense_weights, read_while_importing

    with ExitStack() as stack:
        with report.working():
            planned = fetch_dense_weights(planned, report)
            preload = stack.enter_context(read_while_importing(planned, import_libraries, report))
            from switchrun.model.engine import Engine
            from switchrun.model.settings import check_settings

            check_settings(planned.checkpoint)
            engine = stack.enter_context(Engine(planned, partial(report, "open"), warn, preload))
        report.read_bytes = lambda: engine.cache.read_bytes
        yield engine
