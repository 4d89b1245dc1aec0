"""What an expert costs beside its bytes and its products: `python benchmarks/steady_state.py --model DIR`.

Prints, for a session whose slots have all been used: the time of a sparse layer with one token whose expert is in
memory, with and without the two matrix products and what lies between them; and the page faults of an expert load, and
the growth of memory.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from typing import Any

import torch

from switchrun.kernels.matrices import ExpertWeights
from switchrun.machine import ram
from switchrun.model.engine import Engine
from switchrun.planning.opening import plan_model
from switchrun.planning.options import OpenOptions

REPEATS = 200
LOADS = 60


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--cpu-memory", default="4GiB")
    parser.add_argument("--offload-folder")
    options = parser.parse_args()
    opening = OpenOptions(model=options.model, cpu_memory=options.cpu_memory, offload_folder=options.offload_folder)
    with torch.no_grad(), Engine(plan_model(opening)) as engine:
        keys = list(engine.checkpoint.experts)
        slots = engine.cache.num_slots
        for key in keys[: 2 * slots]:
            list(engine.cache.stream([key]))
        print_loads(engine, keys[2 * slots : 2 * slots + LOADS])
        print_hit(engine)


def print_loads(engine: Engine, keys: list[Any]) -> None:
    """Read experts that are not in memory, one after another."""
    loads = engine.cache.counters().loads
    faults, resident = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, ram.rss_bytes()
    for key in keys:
        list(engine.cache.stream([key]))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    grown = ram.rss_bytes() - resident
    loads = engine.cache.counters().loads - loads
    pages = engine.checkpoint.expert_bytes // 4096
    print(
        f"{loads} loads of {pages:,} pages each: {faults / loads:.2f} page faults a load, RSS grew by {grown:,} bytes"
    )


def print_hit(engine: Engine) -> None:
    """Time a sparse layer with a hit, and within it the products: after a pause both are slower than on their own."""
    block = engine.checkpoint.sparse_blocks["encoder"][0]
    layer = engine.model.encoder.block[block].layer[-1].mlp.experts
    key = next(key for key in engine.checkpoint.experts if (key.stack, key.block) == ("encoder", block))
    compute = getattr(torch, engine.plan.precision.compute.torch_name)
    hidden = torch.randn(1, engine.checkpoint.config["d_model"]).to(compute)
    chosen = torch.zeros(1, 1, engine.checkpoint.num_experts, dtype=torch.long)
    chosen[0, 0, key.expert] = 1
    probability = torch.ones(1, 1, dtype=compute)
    products, run = [], layer._run

    def timed_run(weights: ExpertWeights, tokens: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        result: torch.Tensor = run(weights, tokens)
        products.append(time.perf_counter() - start)
        return result

    layer._run = timed_run
    rest = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        layer(hidden, chosen, probability)
        rest.append(time.perf_counter() - start - products[-1])
    inside, beside = statistics.median(products) * 1e3, statistics.median(rest) * 1e3
    print(f"a hit: its products {inside:.3f} ms, all else {beside:.3f} ms")


if __name__ == "__main__":
    main()
