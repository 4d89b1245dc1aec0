"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping

from switchrun.serve.scheduler import Scheduler

Samples = Iterable[tuple[Mapping[str, str], float]]


class Requests:
    """Counts requests by route and status."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._seconds: Counter[str] = Counter()

    def count(self, route: str, status: int, seconds: float) -> None:
        """Count one that was answered; status 499 is a client that left."""
        with self._lock:
            self._counts[route, str(status)] += 1
            self._seconds[route] += seconds  # type: ignore[assignment] # a Counter of floats

    def totals(self) -> tuple[Samples, Samples]:
        """Return the counts, and the seconds that answering took."""
        with self._lock:
            counts = [({"route": route, "status": status}, n) for (route, status), n in sorted(self._counts.items())]
            return counts, [({"route": route}, n) for route, n in sorted(self._seconds.items())]


def exposition(scheduler: Scheduler, requests: Requests) -> str:
    """Write all counts; those of the session are as of the last batch."""
    tally, stats, waiting, rows = scheduler.tally()
    counts, seconds = requests.totals()
    lines: list[str] = []

    def write(name: str, kind: str, text: str, samples: Samples) -> None:
        lines.extend((f"# HELP switchrun_{name} {text}", f"# TYPE switchrun_{name} {kind}"))
        for labels, value in samples:
            shown = ",".join(f'{key}="{label}"' for key, label in labels.items())
            lines.append(f"switchrun_{name}{{{shown}}} {value:.17g}" if shown else f"switchrun_{name} {value:.17g}")

    def one(name: str, kind: str, text: str, value: float) -> None:
        write(name, kind, text, [({}, value)])

    one("ready", "gauge", "1 if requests are taken.", scheduler.ready)
    write("requests_total", "counter", "Requests that were answered, by route and status.", counts)
    write("request_seconds_total", "counter", "Seconds that answering them took.", seconds)
    one("queue_requests", "gauge", "Requests that wait or are being worked on.", waiting)
    one("queue_inputs", "gauge", "Their inputs.", rows)
    one("batches_total", "counter", "Batches that were run.", tally.batches)
    one("inputs_total", "counter", "Inputs in them: inputs ÷ batches is the mean batch size.", tally.rows)
    one("cancelled_inputs_total", "counter", "Inputs whose client left.", tally.cancelled_rows)
    one("failed_inputs_total", "counter", "Inputs of batches that failed.", tally.failed_rows)
    tokens = [({"kind": "input"}, tally.input_tokens), ({"kind": "output"}, tally.output_tokens)]
    write("tokens_total", "counter", "Tokens read and generated.", tokens)
    stages = [("queue", tally.queue_seconds), ("work", tally.work_seconds)]
    if stats is not None:
        stages.append(("wait", stats.wait_seconds))
    write(
        "stage_seconds_total",
        "counter",
        "Seconds that inputs waited in the queue, that batches took, and of those that the model waited for experts.",
        [({"stage": name}, value) for name, value in stages],
    )
    if stats is not None:
        tiers = stats.experts.tiers
        for name, text in (
            ("requests", "Experts that were asked of a tier."),
            ("hits", "Of those, the ones that were there."),
            ("loads", "Experts that were brought to a tier from a slower one."),
            ("load_bytes", "Their bytes."),
        ):
            write(f"expert_{name}_total", "counter", text, [({"tier": t.tier}, getattr(t, name)) for t in tiers])
        one("hub_bytes_total", "counter", "Bytes that came from the Hub.", stats.hub.bytes if stats.hub else 0)
        one("peak_rss_bytes", "gauge", "Peak resident set of the process.", stats.memory.peak_rss_bytes)
        if stats.memory.peak_gpu_bytes is not None:
            one("peak_gpu_bytes", "gauge", "Peak memory of the GPUs in use.", stats.memory.peak_gpu_bytes)
    return "\n".join(lines) + "\n"
