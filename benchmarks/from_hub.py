r"""Fill with switch-c-2048's full geometry straight from a Hub: how long, how many bytes, how well the link is used.

    python benchmarks/from_hub.py /path/to/folder --container torch
    python benchmarks/from_hub.py /path/to/folder --container torch --latency 0.05 --bandwidth 12.5MB/s
    python benchmarks/from_hub.py /path/to/folder --qmoe --line 12.5MB/s

The Hub is the tests' fake one, in a process of its own on this machine; huggingface_hub's client talks to it. Makes the
checkpoint in the folder once (see full_geometry.py): its experts are holes, so that they cost no disk time to send, but
time and room to keep, 51 MB each. With --qmoe it is in QMoE's format, and the experts that are routed to are real. What
is fetched is kept in a folder beside it, and removed at the end.

Prints a line for each fill: the first, from nothing, and a second, that finds everything kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from full_geometry import write_torch

from switchrun.bench.synthetic import GEOMETRIES, Container, make_checkpoint, make_synthetic
from switchrun.checkpoint.locate import demo_folder
from switchrun.planning.budgets import parse_rate
from switchrun.units import format_bytes, format_rate, parse_bytes

ROOT = Path(__file__).resolve().parents[1]
ID = "google/switch-c-2048"
TEXT = (
    "The <extra_id_0> walks into a bar and orders a <extra_id_1> with a pinch of <extra_id_2>, "
    "since the man at the door has told it to do so."
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--container", choices=["torch", "safetensors"], default="torch")
    parser.add_argument("--qmoe", action="store_true", help="QMoE's format instead of a container's")
    parser.add_argument("--experts", type=int, help="experts in each layer, if not the geometry's own")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds of a round trip")
    parser.add_argument("--bandwidth", help="of one connection, like 12.5MB/s; without it there is no limit")
    parser.add_argument("--line", help="of all connections together, like 12.5MB/s; without it there is no limit")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cpu-memory", default="6GiB")
    parser.add_argument("--max-new-tokens", type=int, default=4)
    options = parser.parse_args()
    rate, line = parse_rate("bandwidth", options.bandwidth), parse_rate("line", options.line)
    if options.qmoe:
        model = make_synthetic("switch-c-2048-qmoe", None, options.folder, print).path
    else:
        model = make_model(options.folder, options.container, options.experts)
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as work,
        fake_hub(model, options.latency, rate, line) as hub,
    ):
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": f"{work}/huggingface",
            "SWITCHRUN_CACHE": f"{work}/cache",
        }
        command = [sys.executable, "-m", "switchrun", "fill", "--model", ID, "--hub", "ranges", "--format", "json"]
        command += ["--tokenizer", str(demo_folder()), "--dtype", options.dtype, "--cpu-memory", options.cpu_memory]
        command += ["--max-new-tokens", str(options.max_new_tokens), "--offload-folder", f"{work}/offload", TEXT]
        allowed = parse_bytes(options.cpu_memory)
        for name in ("from nothing", "once kept"):
            show(name, fill(command, env), allowed)
    print(json.dumps(hub.seen))
    if rate is not None:
        # While an answer is awaited or sent, its connection could have carried as much as it may.
        print(f"achieved ÷ given: {hub.seen['sent'] / (hub.seen['seconds'] * rate):.3f} of each connection")


def make_model(folder: Path, container: str, experts: int | None) -> Path:
    """Make the checkpoint, or find what was made before."""
    model = folder / f"{container}-{experts or 'all'}"
    if not (model / "config.json").is_file():
        geometry = GEOMETRIES["switch-c-2048"]
        geometry = replace(geometry, num_experts=experts) if experts else geometry
        start = time.perf_counter()
        torch_zip = Container("pytorch_model", ".bin", write_torch) if container == "torch" else None
        made = model.with_name(f"{model.name}.part")
        shutil.rmtree(made, ignore_errors=True)
        make_checkpoint(made, geometry, container=torch_zip)
        made.rename(model)
        print(f"made {model} in {time.perf_counter() - start:.0f} s")
    return model


class Hub:
    """The fake Hub's address, and once it has ended, what it has seen."""

    endpoint: str
    seen: dict[str, Any]


@contextmanager
def fake_hub(model: Path, latency: float, rate: float | None, line: float | None) -> Iterator[Hub]:
    """Run the Hub until the context is left."""
    command = [sys.executable, "-m", "tests.support.fake_hub", f"{ID}={model}", "--latency", str(latency)]
    command += [] if rate is None else ["--bandwidth", str(rate)]
    command += [] if line is None else ["--line", str(line)]
    child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    hub = Hub()
    try:
        hub.endpoint = json.loads(child.stdout.readline())["endpoint"]
        yield hub
        output, _ = child.communicate()
        hub.seen = json.loads(output)
    finally:
        child.kill()
        child.wait()


def fill(command: list[str], env: Mapping[str, str]) -> dict[str, Any]:
    """Run a fill; return its record, with the seconds of the whole process."""
    start = time.perf_counter()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    print(done.stderr.rstrip())
    return {**json.loads(done.stdout), "seconds": time.perf_counter() - start}


def show(name: str, record: Mapping[str, Any], allowed: int) -> None:
    """Print what a fill took."""
    experts, timing, peak = record["experts"], record["timing"], record["memory"]["peak_rss_bytes"]
    rate = experts["hub_bytes"] / timing["total_seconds"]
    print(
        f"{name}: {record['seconds']:.1f} s in all, open {timing['open_seconds']:.1f} s, "
        f"fill {timing['total_seconds']:.1f} s; {experts['hub_loads']} of {experts['loads']} experts from the Hub, "
        f"{format_bytes(experts['hub_bytes'])}, {format_rate(rate)} over the fill; "
        f"peak {format_bytes(peak)} of {format_bytes(allowed)}",
        flush=True,
    )


if __name__ == "__main__":
    main()
