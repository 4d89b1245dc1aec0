"""A process stays within its `--cpu-memory`, whatever the model, the dtype, the budget and the batch."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from memory_group import MemoryGroup
from memory_promise import WAYS, Case, draw_cases, make_model, peak_of

from switchrun.bench.synthetic import Geometry
from switchrun.units import GIB, MIB

#: Dense weights that are most of what a fill takes, and come from disk one by one, wider than they are stored.
DEEP = Case(
    Geometry(d_model=1536, d_ff=3072, d_kv=64, num_heads=24, num_layers=6, num_experts=2, vocab_size=8192),
    stored="BF16", dtype="fp32", room=0, rows=1, tokens=24, new_tokens=2, beams=1, threads=2,
)  # fmt: skip
SMALL = Geometry(d_model=256, d_ff=512, d_kv=64, num_heads=4, num_layers=2, num_experts=4, vocab_size=32128)
BATCH = Case(SMALL, stored="F32", dtype="auto", room=0, rows=16, tokens=512, new_tokens=2, beams=1, threads=2)
BEAMS = Case(SMALL, stored="F16", dtype="nf4", room=0.5, rows=4, tokens=100, new_tokens=4, beams=4, threads=1)
#: In bfloat16 each token's products have shapes of their own, for which oneDNN makes code.
LONG = Case(SMALL, stored="BF16", dtype="bf16", room=0, rows=2, tokens=24, new_tokens=300, beams=1, threads=2)


def check(case: Case, folder: Path, env: dict[str, str], way: str) -> None:
    model = make_model(folder / "model", case.geometry, case.stored)
    budget = case.budget(model)
    peak = peak_of(case, model, way, budget, env)
    assert peak <= budget, f"{peak / MIB:.0f} MiB of {budget / MIB:.0f} MiB: {case}"


@pytest.mark.parametrize(("case", "way"), [(DEEP, "cli")], ids=["deep-cli"])
def test_a_process_stays_within_its_budget(case: Case, way: str, tmp_path: Path, hermetic: dict[str, str]) -> None:
    check(case, tmp_path, hermetic, way)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "way"),
    [(DEEP, "api"), (BATCH, "cli"), (BEAMS, "api")],
    ids=["deep-api", "batch-cli", "beams-api"],
)
def test_so_does_the_other_way_to_fill(case: Case, way: str, tmp_path: Path, hermetic: dict[str, str]) -> None:
    check(case, tmp_path, hermetic, way)


@pytest.mark.parametrize(
    "way", [pytest.param(WAYS[0], marks=pytest.mark.slow), pytest.param(WAYS[1], marks=pytest.mark.campaign)]
)
def test_code_that_onednn_makes_stays_within_the_budget(way: str, tmp_path: Path, hermetic: dict[str, str]) -> None:
    check(LONG, tmp_path, hermetic, way)


@pytest.mark.parametrize(
    "number", [pytest.param(each, marks=pytest.mark.campaign if each else pytest.mark.slow) for each in range(60)]
)
def test_random_fills_stay_within_their_budgets(number: int, tmp_path: Path, hermetic: dict[str, str]) -> None:
    (case,) = islice(draw_cases(20), number, number + 1)
    check(case, tmp_path, hermetic, WAYS[number % 2])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[:1])
def test_the_kernel_kills_nobody(way: str, tmp_path: Path, hermetic: dict[str, str]) -> None:
    """A limit a little above the budget, and the default budget within a limit."""
    model = make_model(tmp_path / "model", DEEP.geometry, DEEP.stored)
    budget = DEEP.budget(model)
    for limit, allowed in ((budget * 111 // 100, budget), (3 * GIB, None)):
        try:
            group = MemoryGroup(limit)
        except OSError as error:
            pytest.skip(str(error))
        with group:
            assert peak_of(DEEP, model, way, allowed, hermetic, group) <= limit
