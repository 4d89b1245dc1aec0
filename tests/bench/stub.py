"""A child that does what its task says: answers, fails, crashes, or sleeps."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from switchrun.bench.child_process import answer_task
from switchrun.errors import BudgetError
from switchrun.model.reporting import Reporter


def work(task: dict[str, Any], report: Reporter) -> dict[str, Any]:
    if "pid_file" in task:
        Path(task["pid_file"]).write_text(str(os.getpid()))
    if task["do"] == "budget":
        raise BudgetError("too small", "more")
    if task["do"] == "crash":
        raise ZeroDivisionError("a bug")
    if task["do"] == "die":
        os.kill(os.getpid(), 9)
    if task["do"] == "report":
        report("decode", 1, 12)
        report("decode", 2, 12)
        time.sleep(task["value"])
    if task["do"] == "sleep":
        time.sleep(60)
    print("a library talks")  # noqa: T201
    sys.stdout.flush()
    return {"answer": task["value"]}


if __name__ == "__main__":
    answer_task(work)
