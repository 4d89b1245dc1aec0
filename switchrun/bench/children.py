"""Child processes that measure: started, limited, timed, and never left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

from switchrun.bench.cgroup import MemoryGroup
from switchrun.errors import SwitchrunError

_STDERR_LINES = 3


class ChildError(Exception):
    """A child gave no answer, or an error as its answer.

    Attributes:
        record: What is put into the cell's record: kind, message, hint and exit code.
    """

    def __init__(self, message: str, hint: str = "", kind: str = "crash", exit_code: int = 1) -> None:
        super().__init__(message)
        self.record = {"kind": kind, "message": message, "hint": hint, "exit_code": exit_code}


def run_child(
    module: str, task: dict[str, Any], memory_limit: int | None, timeout: float | None = None
) -> dict[str, Any]:
    """Run a module with a task and give its answer; blocks until it ends. Whatever happens, the child is gone then.

    Args:
        module: Its name; see `switchrun.bench.cell.main`.
        task: Goes to its stdin as JSON, with the file that tells the limited group's peak.
        memory_limit: Bytes for the child and its page cache; None is no limit.
        timeout: Seconds before it is killed.

    Returns:
        The answer.

    Raises:
        ChildError: It crashed, was killed, took too long, or answered with an error.
        UsageError: The limit cannot be had here.
    """
    with ExitStack() as stack:
        group = None if memory_limit is None else stack.enter_context(MemoryGroup(memory_limit))
        child = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C is for us: we end the child, and the records of those before are kept.
            start_new_session=True,
        )
        stack.callback(_end, child)
        if group is not None:
            group.add(child.pid)
            task = task | {"group_peak_file": str(group.peak_file)}
        start = time.perf_counter()
        try:
            output, errors = child.communicate((json.dumps(task) + "\n").encode(), timeout)
        except subprocess.TimeoutExpired:
            seconds = time.perf_counter() - start
            raise ChildError(f"not done after {seconds:.0f} s", "allow more time", "timeout") from None
    answer = _parse(output)
    if child.returncode or answer is None:
        raise _crash(child.returncode, errors.decode("utf-8", "replace"), memory_limit)
    if "error" in answer:
        raise ChildError(**answer["error"])
    return answer


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.kill()
    child.communicate()


def _parse(output: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(output)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _crash(code: int, errors: str, memory_limit: int | None) -> ChildError:
    if code == -signal.SIGKILL:
        why = "by the kernel, for it took more than --memory-limit" if memory_limit else "perhaps out of memory"
        return ChildError(f"the process was killed ({why})", "lower --cpu-memory or raise --memory-limit", "killed", 6)
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    tail = " | ".join(lines[-_STDERR_LINES:]) or "it said nothing"
    return ChildError(f"the process ended with {code}: {tail}", exit_code=SwitchrunError.exit_code)
