"""The process in which `bench` and `eval` measure: it starts as `fill` does, and takes its task from stdin."""

from __future__ import annotations

from switchrun.bench.child_process import Answer, Task, answer_task
from switchrun.cli.startup import import_libraries, share_one_heap
from switchrun.machine.limits import check_limits
from switchrun.model.reporting import Reporter


def work(task: Task, report: Reporter) -> Answer:
    """Do what a task says."""
    check_limits()
    if task["work"] == "evaluate":
        from switchrun.bench.evaluation import evaluate_dtype

        return evaluate_dtype(task, import_libraries, report)
    from switchrun.bench.measure import measure

    return measure(task, import_libraries, report)


if __name__ == "__main__":
    share_one_heap()
    answer_task(work)
