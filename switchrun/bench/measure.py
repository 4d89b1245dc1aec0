"""What a measuring process does: opens a model, fills, and reads the same again. No torch until it opens."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from switchrun.bench.child_process import Answer, Task, open_engine
from switchrun.bench.raw_disk import io_read_bytes, replay_all
from switchrun.checkpoint.generation import end_token
from switchrun.checkpoint.remote import HubRanges, Traffic
from switchrun.errors import InputError
from switchrun.machine import processor, ram
from switchrun.model.opening import ImportLibraries, import_model
from switchrun.model.reporting import Reporter
from switchrun.planning.memory import max_input_tokens
from switchrun.planning.opening import plan_model
from switchrun.planning.options import OpenOptions

if TYPE_CHECKING:
    from switchrun.model.engine import Engine

_INTERVAL_SECONDS = 0.1
#: T5's vocabularies end with sentinels and unused ids; the small ones of tests have no room to leave out any.
_LEFT_OUT, _SMALL_VOCABULARY = 128, 1024


def measure(task: Task, import_libraries: ImportLibraries = import_model, report: Reporter | None = None) -> Answer:
    """Open the model, fill as often as the task says, and replay each fill's reads without a model."""
    report = report or Reporter()
    with contextlib.closing(MemoryTimeline()) as timeline:
        options = OpenOptions(
            model=task["model"],
            dtype=task["dtype"],
            cpu_memory=task["cpu_memory_bytes"],
            gpu_memory=task["gpu_memory"],
            offload_folder=task["offload_folder"],
            hub=task["hub"],
            batch_size=task["batch_size"],
            max_new_tokens=task["output_tokens"],
        )
        warnings: list[str] = []
        with report.working():
            planned = plan_model(options, input_tokens=task["input_tokens"], warn=warnings.append, steps=report)
        hub = planned.hub
        longest = max_input_tokens(planned.checkpoint)
        if task["input_tokens"] > longest:
            raise InputError(f"the model takes {longest} tokens at most", "lower --input-tokens")
        with open_engine(planned, warnings.append, import_libraries, report) as engine:
            answer: Answer = {
                "open_seconds": processor.process_age_seconds(),
                "open_io_read_bytes": io_read_bytes(),
                "open_hub": _hub_counts(hub, Traffic()),
                "plan": _plan_record(engine),
                "fills": [],
            }
            from switchrun.bench.probe import Probe, used_experts

            with Probe(engine) as probe:
                for number in range(task["fills"]):
                    # Later fills of a process meet new words, as a user's second sentence does.
                    seed = task["seed"] + number
                    rows = make_inputs(planned.checkpoint.config, task["batch_size"], task["input_tokens"], seed)
                    before = Traffic() if hub is None else hub.traffic
                    with report.working((number,) if task["fills"] > 1 else ()):
                        report("encode")
                        most = task["output_tokens"]
                        fill = probe.fill(rows, most, partial(report, "decode", total=most))
                        timeline.close()
                        report("replay")
                        beside = {
                            "hub": _hub_counts(hub, before),
                            "raw": replay_all(probe.reads),
                            "expert_use": used_experts(probe.use),
                        }
                    answer["fills"].append(asdict(fill) | beside)
                    with contextlib.suppress(OSError):  # the next fill's peak counts from here
                        Path("/proc/self/clear_refs").write_text("5")
    return answer | {"timeline": timeline.points, "warnings": warnings}


def make_inputs(config: Mapping[str, Any], batch_size: int, input_tokens: int, seed: int) -> list[list[int]]:
    """Draw a batch of sequences of random words, each with the end of sequence: lengths are exact without a tokenizer.

    A larger batch begins with the smaller one's rows.
    """
    vocabulary = int(config["vocab_size"])
    top = vocabulary - _LEFT_OUT if vocabulary > _SMALL_VOCABULARY else vocabulary
    end = end_token(config)
    rows = []
    for row in range(batch_size):
        draw = random.Random(f"{seed} {row}")
        rows.append([draw.randrange(3, top) for _ in range(input_tokens - 1)] + [end])
    return rows


class MemoryTimeline(threading.Thread):
    """Notes (age of the process in seconds, resident bytes) in `points`, ten times a second until it is closed."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.points: list[tuple[float, int]] = []
        self._closed = threading.Event()
        self.start()

    def run(self) -> None:
        """Note them; the thread's own."""
        while not self._closed.is_set():
            self.points.append((round(processor.process_age_seconds(), 2), ram.rss_bytes()))
            self._closed.wait(_INTERVAL_SECONDS)

    def close(self) -> None:
        """End the thread; closing twice does nothing."""
        self._closed.set()
        self.join()


def _hub_counts(hub: HubRanges | None, before: Traffic) -> Answer | None:
    """Return what was asked of the Hub since then; None if weights are in local files."""
    if hub is None:
        return None
    now = hub.traffic
    requests = now.requests + now.resolves - before.requests - before.resolves
    return {"bytes": now.bytes - before.bytes, "requests": requests, "retries": now.retries - before.retries}


def _plan_record(engine: Engine) -> Answer:
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
