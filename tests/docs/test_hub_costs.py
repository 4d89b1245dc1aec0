"""docs/hub.md says what each model costs over three links: its table is that of the estimate itself."""

from __future__ import annotations

import pytest

from switchrun.bench.synthetic import GEOMETRIES
from switchrun.planning.plan import Bandwidth, HubState
from switchrun.planning.planner import hub_cost
from switchrun.units import KIB, format_bytes, format_seconds
from tests.conftest import ROOT
from tests.planning.made_up import made_up_checkpoint

MBIT = (16, 100, 1000)
HEAD = "| model | all of it | index | dense | experts of a sentence | " + " | ".join(f"{n} Mbit/s" for n in MBIT) + " |"
#: The Hub's shards at most; what is read of each at both ends; what a tensor takes there.
SHARD_BYTES, READ_BYTES, TENSOR_BYTES = 10**10, 144 * KIB, 240


def row(name: str) -> str:
    """What opening a model and filling a sentence of 24 tokens with 12 new ones costs, as the estimate has it."""
    geometry = GEOMETRIES[name]
    checkpoint = made_up_checkpoint(
        stored="F32" if name.startswith("switch-base") else "BF16",
        tied=geometry.tied,
        step=geometry.sparse_step,
        layers=(geometry.num_layers, geometry.num_layers),
        d_model=geometry.d_model,
        d_ff=geometry.d_ff,
        d_kv=geometry.d_kv,
        num_heads=geometry.num_heads,
        num_experts=geometry.num_experts,
        vocab_size=geometry.vocab_size,
        relative_attention_num_buckets=32,
    )
    files = 364 if name == "switch-c-2048" else -(-checkpoint.total_bytes // SHARD_BYTES)
    index = max(files * READ_BYTES, TENSOR_BYTES * (2 * len(checkpoint.experts) + len(checkpoint.dense)))
    costs = [hub_cost(checkpoint, HubState("", 0, network=Bandwidth(n * 125e3, "given")), 1, 24, 12) for n in MBIT]
    sizes = (checkpoint.total_bytes, index, costs[0].dense_bytes, costs[0].expert_bytes)
    times = (cost.seconds + index / cost.bandwidth_bytes_per_second for cost in costs)
    cells = [f"`{name}`", *map(format_bytes, sizes), *map(format_seconds, times)]
    cells[4] += f", {costs[0].expert_loads}"
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", sorted(GEOMETRIES, key=lambda name: GEOMETRIES[name].num_experts))
def test_the_table_is_what_the_estimate_says(name: str) -> None:
    page = (ROOT / "docs" / "hub.md").read_text(encoding="utf-8")
    assert HEAD in page
    assert row(name) in page
