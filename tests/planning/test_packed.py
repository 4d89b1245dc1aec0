"""Plans with packed experts: more slots for the same budget."""

from __future__ import annotations

import pytest

from switchrun.dtypes import Dtype, PackedDtype, Precision, resolve_dtype
from switchrun.errors import UsageError
from switchrun.planning import Budgets, memory
from switchrun.planning.planner import make_plan
from switchrun.units import GIB
from tests.planning.made_up import made_up_checkpoint

#: The experts of switch-c-2048, fewer of them.
LARGE = {"d_model": 2080, "d_ff": 6144, "num_experts": 256}


@pytest.mark.parametrize(("dtype", "times"), [("int8", 2.0), ("nf4", 3.7)])
def test_slots_at_equal_budget(dtype: str, times: float) -> None:
    """All but the buffers for packing, which do not grow with the budget, becomes slots of a half or a quarter."""
    checkpoint = made_up_checkpoint(**LARGE)
    plain = Precision(Dtype.BF16)
    packed = Precision(Dtype.BF16, PackedDtype(dtype))
    size = memory.slot_bytes(checkpoint, packed)
    assert memory.slot_bytes(checkpoint, plain) >= 0.998 * times * size
    buffers = memory.overhead_bytes(checkpoint, packed) - memory.overhead_bytes(checkpoint, plain)
    buffers += memory.activation_bytes(checkpoint, packed, memory.BatchShape(1, 512, 512))
    buffers -= memory.activation_bytes(checkpoint, plain, memory.BatchShape(1, 512, 512))
    for budget in (4 * GIB, 8 * GIB):
        slots = {each: make_plan(checkpoint, Budgets(budget), dtype=each).tier("cpu") for each in ("bf16", dtype)}
        wanted = slots["bf16"].expert_slots * slots["bf16"].slot_bytes - buffers
        assert slots[dtype].expert_slots >= wanted // size
        assert slots[dtype].total_bytes <= budget
    assert slots[dtype].expert_slots >= 0.93 * times * slots["bf16"].expert_slots


def test_buffers_for_packing_are_counted() -> None:
    checkpoint = made_up_checkpoint(**LARGE)
    int8 = Precision(Dtype.BF16, PackedDtype.INT8)
    assert memory.packing_bytes(checkpoint, Precision(Dtype.BF16)) == 0
    assert memory.packing_bytes(checkpoint, int8) >= 2 * memory.slot_bytes(checkpoint, int8)
    assert memory.staging_bytes(checkpoint, int8) >= memory.STAGING_BUFFERS * checkpoint.expert_bytes


@pytest.mark.parametrize(
    ("stored", "choice", "precision"),
    [
        ("BF16", "auto", Precision(Dtype.BF16)),
        ("F16", "auto", Precision(Dtype.FP32)),
        ("F32", "bf16", Precision(Dtype.BF16)),
        ("BF16", "int8", Precision(Dtype.BF16, PackedDtype.INT8)),
        ("F32", "nf4", Precision(Dtype.FP32, PackedDtype.NF4)),
        ("F16", "int8", Precision(Dtype.FP32, PackedDtype.INT8)),
    ],
)
def test_what_a_dtype_comes_to(stored: str, choice: str, precision: Precision) -> None:
    assert resolve_dtype(choice, stored) == precision
    plan = make_plan(made_up_checkpoint(stored=stored), Budgets(4 * GIB), dtype=choice)
    assert plan.precision == precision
    assert plan.dtype == (precision.packed or precision.compute)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UsageError, match="'int4' is not a dtype"):
        resolve_dtype("int4", "BF16")


def test_the_estimate_counts_what_is_packed_already() -> None:
    checkpoint = made_up_checkpoint(**LARGE)
    loads = [
        make_plan(checkpoint, Budgets(4 * GIB), dtype="int8", stored_share=share).estimate.load_bytes
        for share in (0.0, 0.5, 1.0)
    ]
    assert loads[0] > loads[1] > loads[2]
    assert loads[2] == pytest.approx(loads[0] / 2, rel=0.01)
