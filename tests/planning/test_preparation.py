"""Which experts `prepare` takes, and how many jobs fit."""

from __future__ import annotations

import pytest

from switchrun.checkpoint.types import ExpertKey
from switchrun.errors import BudgetError, UsageError
from switchrun.planning import preparation
from switchrun.planning.plan import Bandwidth
from switchrun.planning.preparation import choose_experts, job_bytes, process_bytes, resolve_jobs
from switchrun.store.layout import layout_of
from tests.planning.made_up import made_up_checkpoint

CHECKPOINT = made_up_checkpoint(num_experts=4)  # blocks 1 and 3 of each stack
LAYOUT = layout_of("int8", 64, 256)


@pytest.mark.parametrize(
    ("layers", "experts", "count"),
    [
        (None, None, 16),
        ("encoder", None, 8),
        ("encoder.1", None, 4),
        ("encoder.0-2", None, 4),
        (" encoder.1 , decoder.1-3", "0", 3),
        ("encoder.1,encoder.1-3", "1-2,2", 4),
    ],
)
def test_chosen_experts(layers: str | None, experts: str | None, count: int) -> None:
    chosen = choose_experts(CHECKPOINT, layers, experts)
    assert len(chosen) == count
    assert chosen == [key for key in CHECKPOINT.experts if key in set(chosen)], "in the model's order"


def test_a_chosen_expert_is_the_one_that_was_named() -> None:
    assert choose_experts(CHECKPOINT, "decoder.3", "2") == [ExpertKey("decoder", 3, 2)]


@pytest.mark.parametrize("layers", ["", "x", "encoder.", "encoder.0", "encoder.3-1", "decoder.4", "encoder.-1", "1"])
def test_no_layers(layers: str) -> None:
    with pytest.raises(UsageError, match="--layers"):
        choose_experts(CHECKPOINT, layers, None)


@pytest.mark.parametrize("experts", ["", "4", "2-1", "0-4", "-1", "a", "1,", "1-2-3"])
def test_no_experts(experts: str) -> None:
    with pytest.raises(UsageError, match="--experts"):
        choose_experts(CHECKPOINT, None, experts)


def test_jobs_fit_into_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation.os, "sched_getaffinity", lambda _: set(range(8)))
    one = job_bytes(CHECKPOINT, LAYOUT)
    least = process_bytes(CHECKPOINT, LAYOUT, 1)
    assert process_bytes(CHECKPOINT, LAYOUT, 3) == least + 2 * one
    assert resolve_jobs(CHECKPOINT, LAYOUT, None, least) == 1
    assert resolve_jobs(CHECKPOINT, LAYOUT, None, least + 2 * one) == 3
    assert resolve_jobs(CHECKPOINT, LAYOUT, None, 2**40) == 8
    assert resolve_jobs(CHECKPOINT, LAYOUT, 20, 2**40) == 20
    assert resolve_jobs(CHECKPOINT, LAYOUT, 2, least + one) == 2
    with pytest.raises(BudgetError, match="or --jobs 1"):
        resolve_jobs(CHECKPOINT, LAYOUT, 2, least + one - 1)
    for jobs in (None, 1):
        with pytest.raises(BudgetError, match="give --cpu-memory"):
            resolve_jobs(CHECKPOINT, LAYOUT, jobs, least - 1)


def test_the_time_is_between_side_by_side_and_one_after_the_other() -> None:
    made = preparation.Preparation(tuple(CHECKPOINT.experts), (), 0, 0, file_bytes=100, read_bytes=300, free_bytes=0)
    estimate = made.estimate(Bandwidth(1600, "given"), packing_seconds=0.5)
    assert (estimate.reading, estimate.packing, estimate.writing) == (3, 8, 1)
    assert (estimate.least, estimate.most) == (8, 12)
    slow = made.estimate(Bandwidth(100, "given"), packing_seconds=0.5)
    assert (slow.least, slow.most) == (64, 72)


@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_a_job_of_the_full_geometry_takes_what_the_documents_say(dtype: str) -> None:
    checkpoint = made_up_checkpoint(num_experts=1, d_model=2080, d_ff=6144)
    assert job_bytes(checkpoint, layout_of(dtype, 2080, 6144)) < 92 * 2**20
