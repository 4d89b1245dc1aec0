"""The process that measures: `python -m switchrun.bench.cell` takes a task as JSON on stdin and answers on stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from switchrun.errors import InputError, SwitchrunError

Task = dict[str, Any]
Answer = dict[str, Any]


def main(work: Callable[[Task], Answer]) -> None:
    """Do one task; an error that a user can do something about is an answer too.

    The task is read before anything large is imported: by then the parent has put this process under its limit.
    """
    task = json.loads(sys.stdin.readline())
    # Whatever a library prints must not get into the answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        answer = work(task)
    except SwitchrunError as error:
        answer = {
            "error": {
                "kind": error.kind,
                "message": error.message,
                "hint": error.hint,
                "exit_code": error.exit_code,
            }
        }
    with answers:
        json.dump(answer, answers)


def measure(task: Task) -> Answer:
    """Open the model and fill as often as the task says; see `switchrun.bench.runner` for its keys."""
    from switchrun.bench.process import MemoryTimeline, group_peak_bytes, io_read_bytes, reset_peak_rss

    with MemoryTimeline() as timeline:
        from switchrun.machine import processor
        from switchrun.model.preload import import_model, read_while_importing
        from switchrun.planning.memory import max_input_tokens
        from switchrun.planning.opening import plan_model
        from switchrun.planning.options import OpenOptions

        options = OpenOptions(
            model=task["model"],
            dtype=task["dtype"],
            cpu_memory=task["cpu_memory_bytes"],
            gpu_memory=task["gpu_memory"],
            offload_folder=task["offload_folder"],
            batch_size=task["batch_size"],
            max_new_tokens=task["output_tokens"],
        )
        planned = plan_model(options, input_tokens=task["input_tokens"])
        longest = max_input_tokens(planned.checkpoint)
        if task["input_tokens"] > longest:
            raise InputError(f"the model takes {longest} tokens at most", "lower --input-tokens")
        with read_while_importing(planned, import_model) as preload:
            from switchrun.bench.measure import Probe
            from switchrun.bench.workload import make_inputs
            from switchrun.model.engine import Engine

            warnings: list[str] = []
            with Engine(planned, warn=warnings.append, preload=preload) as engine, Probe(engine) as probe:
                answer: Answer = {
                    "open_seconds": processor.process_age_seconds(),
                    "open_io_read_bytes": io_read_bytes(),
                    "plan": _plan_record(engine),
                    "fills": [],
                }
                for turn in range(task["fills"]):
                    # A cold fill always has the same input; a warm one meets new words, as in a user's second sentence.
                    seed = task["seed"] if task["cold"] else task["seed"] + turn
                    rows = make_inputs(planned.checkpoint.config, task["batch_size"], task["input_tokens"], seed)
                    first = probe.fill(rows, task["output_tokens"])
                    timeline.stop()
                    peak = {"peak_group_bytes": group_peak_bytes(task)}
                    answer["fills"].append(_examine(task, engine, probe, rows, first) | peak)
                    reset_peak_rss()
    answer["timeline"] = timeline.points
    answer["warnings"] = warnings
    return answer


def _examine(task: Task, engine: Any, probe: Any, rows: list[list[int]], first: Any) -> Answer:
    """Measure what a fill is compared with: the raw disk, a second pass, and computing alone."""
    from switchrun.bench.measure import used_experts
    from switchrun.bench.page_cache import drop_page_cache
    from switchrun.bench.replay import Ring, replay
    from switchrun.experts.ways import WAYS

    reads, use = probe.reads, used_experts(probe.use)
    raw, ring = [], Ring()
    # Each way is first, second and so on in turn: whoever reads last finds the disk's own caches filled.
    for number in range(len(WAYS)):
        way = WAYS[(number + task["turn"]) % len(WAYS)]
        raw.append(asdict(way) | {stack: replay(reads[stack], way, ring) for stack in reads})
    ring.close()
    record: Answer = first.as_record() | {"raw": raw, "expert_use": use, "second_pass": None}
    if task["cold"]:
        engine.tiers.clear()
        drop_page_cache({each.file for stack in reads.values() for each in stack})
        record["second_pass"] = probe.fill(rows, task["output_tokens"]).as_record()
    record["compute"] = probe.compute_only(rows, task["output_tokens"]).as_record()
    return record


def _plan_record(engine: Any) -> Answer:
    plan = engine.plan
    use = plan.tier("cpu")
    return {
        "dtype": plan.dtype,
        "stored_dtype": plan.stored_dtype,
        "num_experts": plan.num_experts,
        "experts_per_layer": engine.checkpoint.num_experts,
        "expert_bytes": plan.expert_bytes,
        "total_bytes": plan.total_bytes,
        "expert_slots": use.expert_slots,
        "slot_bytes": use.slot_bytes,
        "dense_bytes": use.dense_bytes,
        "cpu_budget_bytes": use.budget_bytes,
        "repairs": list(plan.repairs),
    }


if __name__ == "__main__":
    main(measure)
