"""The verdict: what limits is what the figures say, and what would help is worked out from them."""

from __future__ import annotations

from typing import Any

import pytest

from switchrun.bench.records import SPARSE
from switchrun.bench.verdict import verdict
from tests.support.bench_records import GIB, failed, measured

INT8 = {"dtype": "int8", "stored_dtype": "BF16", "slot_bytes": 25_600_000}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            measured(),
            "The disk limits: 71 % of a fill was waiting for it. 21 GiB more memory would keep every expert for the "
            "next fills; int8 would read 50 % of the bytes.",
        ),
        (
            measured(plan=INT8 | {"num_experts": 61440}),
            "The disk limits: 71 % of a fill was waiting for it. nf4 would read 56 % of the bytes.",
        ),
        (
            measured(plan={"dtype": "qmoe", "stored_dtype": "QMOE", "num_experts": 61440}),
            "The disk limits: 71 % of a fill was waiting for it. A disk twice as fast would save 36 %.",
        ),
        (
            measured(used=60),
            "Memory is too small: 70 % of the reads were of experts that the same fill had read before, and 71 % of "
            "the fill was waiting for the disk. 975 MiB more memory would keep every expert that a fill uses; int8 "
            "would read 50 % of the bytes.",
        ),
        (
            measured(hub_bytes=9 * GIB),
            "The network limits: 71 % of a fill was waiting, and 9 GiB came from the Hub. They are kept: the same fill "
            "would fetch nothing the next time.",
        ),
        (
            measured(wait=2, experts=5, dense=3),
            "Computing limits: 80 % of a fill, 50 % for experts and 30 % for all else. A faster disk or more memory "
            "would save 20 % at most.",
        ),
        (
            measured(wait=0, notes=(f"the experts lie in {SPARSE}: do something",)),
            f"What limits here cannot be said: the experts lie in {SPARSE}: do something.",
        ),
        (failed(), "Nothing was measured: it needs 5 GiB (raise --cpu-memory)."),
    ],
    ids=["disk", "nf4", "nothing", "memory", "network", "computing", "sparse", "failed"],
)
def test_one_cell(record: dict[str, Any], words: str) -> None:
    assert verdict([record]) == words


def test_several_cells() -> None:
    slow, fast = measured(batch_size=1), measured(batch_size=8)
    found = verdict([slow, failed(batch_size=2), fast])
    assert found.startswith("Cell 3 is the fastest (bf16, batch 8): 0.8 inputs/s. The disk limits: 71 %")
    assert found.endswith(" 1 cell of 3 failed.")


def test_a_long_time_to_open() -> None:
    found = verdict([measured(wait=0.0, experts=0.2, dense=0.1)])
    assert found.endswith(" Opening takes 9 times as long as a fill: give all inputs to one command.")


def test_what_was_not_waited_for_in_sparse_files_is_judged_all_the_same() -> None:
    assert verdict([measured(notes=(f"some lie in {SPARSE}",))]).startswith("The disk limits")
