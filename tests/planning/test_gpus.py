"""GPUs in a plan: which are used, for what, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

import switchrun
from switchrun.dtypes import resolve_dtype
from switchrun.errors import BudgetError
from switchrun.machine import gpus
from switchrun.machine.gpus import Gpu
from switchrun.planning import Budgets, Plan, memory
from switchrun.planning.device_map import read_device_map
from switchrun.planning.planner import fit_to_runtime, make_plan
from switchrun.units import GIB, MIB
from tests.planning.made_up import made_up_checkpoint

PLENTY = 1 << 50
#: Slots of 4 MiB, sparse layers encoder.1 and .3, decoder.1 and .3, of 32 experts each.
CHECKPOINT = made_up_checkpoint(d_model=512, d_ff=2048, num_experts=32)
SLOT = memory.gpu_slot_bytes(CHECKPOINT, resolve_dtype("auto", "BF16"))


def plan_for(gpu_bytes: dict[int, int], cpu_bytes: int = PLENTY, **options: object) -> Plan:
    return make_plan(CHECKPOINT, Budgets(cpu_bytes, gpu_bytes), **options)  # type: ignore[arg-type]


def test_all_on_one_gpu() -> None:
    plan = plan_for({0: PLENTY})
    gpu = plan.tier("gpu:0")
    assert set(plan.device_map.values()) == {"gpu:0"}
    assert gpu.expert_slots == 4 * 32, "no more than there are experts"
    assert gpu.overhead_bytes == memory.GPU_LIBRARY_BYTES
    assert plan.tier("cpu").expert_slots == 4 * 32, "the level behind it"
    assert (plan.notes, plan.gpus) == ((), (0,))


def test_what_a_gpu_has_left_becomes_slots() -> None:
    whole = plan_for({0: PLENTY}).tier("gpu:0")
    fixed = whole.total_bytes - whole.expert_bytes
    for slots in (2, 3, 127):
        use = plan_for({0: fixed + (slots + 1) * SLOT - 1}).tier("gpu:0")
        assert (use.expert_slots, use.slot_bytes, use.dense_bytes) == (slots, SLOT, whole.dense_bytes)
    # With less, dense weights leave before the last two slots do.
    less = plan_for({0: fixed + 2 * SLOT - 1})
    assert less.tier("gpu:0").expert_slots >= 2
    assert less.tier("gpu:0").dense_bytes < whole.dense_bytes
    assert less.tier("cpu").dense_bytes > 0


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "int8", "nf4"])
@pytest.mark.parametrize("d_ff", [100, 2048, 9000])
def test_a_slot_holds_an_expert_as_it_is_kept(dtype: str, d_ff: int) -> None:
    checkpoint = made_up_checkpoint(d_model=512, d_ff=d_ff)
    precision = resolve_dtype(dtype, "BF16")
    parts = memory.kept_parts(checkpoint, precision)
    plain = 2 * 512 * d_ff
    each = {"bf16": 2, "fp32": 4, "int8": 1, "nf4": 0.5}[dtype]
    assert len(parts) == (4 if precision.packed else 2)
    assert plain * each <= sum(parts) <= plain * each * 1.1
    begins = [sum(-(-part // 256) * 256 for part in parts[:n]) for n in range(len(parts))]
    assert begins[-1] + parts[-1] <= memory.gpu_expert_bytes(checkpoint, precision) < sum(parts) * 1.01 + 1024


def sparse_layers_on(plan: Plan, tier: str) -> list[str]:
    sparse = ("encoder.block.1", "encoder.block.3", "decoder.block.1", "decoder.block.3")
    return [placed.module for placed in plan.placements if placed.module in sparse and placed.tier == tier]


@pytest.mark.parametrize(("second", "layers"), [(1.0, (2, 2)), (1 / 3, (3, 1)), (3.0, (1, 3))])
def test_layers_are_spread_over_gpus_by_their_room(second: float, layers: tuple[int, int]) -> None:
    """Each has as much left for slots as its layers want; together they hold what one alone could not."""
    whole = plan_for({0: PLENTY}).tier("gpu:0")
    fixed = whole.activation_bytes + whole.overhead_bytes
    first = int((whole.total_bytes - fixed) / (1 + second)) - 4 * SLOT
    plan = plan_for({0: fixed + first, 1: fixed + int(first * second)})
    on = [plan.tier("gpu:0"), plan.tier("gpu:1")]
    assert sum(use.dense_bytes for use in on) == whole.dense_bytes
    assert tuple(len(sparse_layers_on(plan, use.tier)) for use in on) == layers
    assert sum(use.expert_slots for use in on) >= 4 * 32 - 20
    tiers = [placed.tier for placed in plan.placements]
    assert tiers == sorted(tiers), "neighbours stay together"


def test_gpus_too_small_for_all_dense_weights_are_filled_in_their_order() -> None:
    whole = plan_for({0: PLENTY}).tier("gpu:0")
    small = whole.total_bytes - whole.expert_bytes - whole.dense_bytes + 2 * SLOT + 8 * MIB
    plan = plan_for({0: small, 1: small}, cpu_bytes=plan_for({}).minimum_cpu_bytes)
    tiers = [placed.tier for placed in plan.placements]
    assert tiers == sorted(tiers, key=["gpu:0", "gpu:1", "cpu", "disk"].index)
    assert {"gpu:0", "gpu:1", "disk"} <= set(tiers)


def test_a_gpu_that_is_not_needed_is_not_used() -> None:
    plan = plan_for({0: PLENTY, 1: PLENTY})
    assert plan.gpus == (0,)
    assert plan.tier("gpu:1").total_bytes == 0
    assert plan.notes == ("gpu:1 is not used: the GPUs before it hold every weight",)


@pytest.mark.parametrize("others", [{}, {1: PLENTY}])
def test_a_gpu_too_small_for_a_layer_with_experts_is_let_be(others: dict[int, int]) -> None:
    plan = plan_for({0: 64 * MIB} | others)
    assert plan.tier("gpu:0").total_bytes == 0
    assert plan.gpus == tuple(others)
    assert set(plan.device_map.values()) == ({f"gpu:{number}" for number in others} or {"cpu"})
    [note] = plan.notes
    assert note.startswith("gpu:0 is not used: a layer with experts needs ")
    assert note.endswith(" MiB there, 64 MiB is allowed")
    if not others:
        named = int(note.split(" needs ")[1].split(" ")[0])
        assert plan_for({0: named * MIB}).gpus == (0,), "what the note names is enough"
        assert "decoder.block.1" not in {p.module for p in plan_for({0: (named - 20) * MIB}).placements if p.tier == 0}


def test_more_gpus_than_layers() -> None:
    whole = plan_for({0: PLENTY}).tier("gpu:0")
    each = whole.total_bytes - whole.expert_bytes + 2 * SLOT
    plan = plan_for(dict.fromkeys(range(9), each))
    used = [use for use in plan.tiers[:-2] if use.dense_bytes]
    assert 2 <= len(used) <= 4
    assert all(use.expert_slots for use in used)
    assert len(plan.notes) == 9 - len(used)
    assert {note.split(": ")[1] for note in plan.notes} == {"no layer with experts is left for it"}


def test_what_stays_on_disk_computes_on_the_first_gpu() -> None:
    device_map = {"": "disk", "decoder.block.0": 1, "decoder.block.1": 2, "encoder.block.1": "cpu"}
    plan = plan_for({0: PLENTY, 1: PLENTY, 2: PLENTY}, device_map=read_device_map(device_map))
    first, second = plan.tier("gpu:1"), plan.tier("gpu:2")
    assert (first.expert_slots, second.expert_slots) == (2 * 32, 32), "encoder.3 and decoder.3; decoder.1"
    # Weights pass through it one at a time.
    assert first.overhead_bytes - second.overhead_bytes == CHECKPOINT.dense["shared.weight"].nbytes
    assert plan.gpus == (1, 2)
    assert plan.notes == ()


def test_a_gpu_without_experts_has_no_slots() -> None:
    plan = plan_for({0: PLENTY}, device_map=read_device_map({"": "cpu", "shared": 0}))
    assert plan.tier("gpu:0").dense_bytes > 0
    assert plan.tier("gpu:0").expert_slots == 0


def test_a_given_map_must_fit() -> None:
    device_map = {"": "cpu", "decoder.block.1": 0}
    with pytest.raises(BudgetError, match=r"the device map needs \d+ MiB on gpu:0, 1 MiB is allowed") as caught:
        plan_for({0: MIB}, device_map=read_device_map(device_map))
    named = int(caught.value.message.split("needs ")[1].split(" ")[0])
    assert plan_for({0: named * MIB}, device_map=read_device_map(device_map)).tier("gpu:0").expert_slots == 1
    with pytest.raises(BudgetError, match="the device map needs"):
        plan_for({0: (named - 1) * MIB}, device_map=read_device_map(device_map))


def test_a_gpu_that_only_the_map_names_gets_few_slots() -> None:
    use = plan_for({}, device_map=read_device_map({"": 3})).tier("gpu:3")
    assert (use.budget_bytes, use.expert_slots) == (None, memory.GPU_RESERVED_SLOTS)


def test_by_default_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert switchrun.plan(cpu_memory="2GiB").gpus == (), "the tests hide this machine's GPUs"
    monkeypatch.setattr(gpus, "torch_cuda", lambda: "12.8")
    monkeypatch.setattr(gpus, "visible_gpus", lambda: (Gpu(0, "made up", 8 * GIB, 7 * GIB),))
    plan = switchrun.plan(cpu_memory="2GiB")
    assert set(plan.device_map.values()) == {"gpu:0"}
    assert plan.tier("gpu:0").budget_bytes == 7 * GIB - 512 * MIB
    assert switchrun.plan(cpu_memory="2GiB", gpu_memory=0).gpus == ()
    assert switchrun.plan(cpu_memory="2GiB", gpu_memory="0").tiers[0].tier == "cpu"


@pytest.mark.parametrize("gpu_bytes", [{}, {0: PLENTY}])
def test_a_process_that_cuda_makes_too_large_is_told_of_the_way_without(gpu_bytes: dict[int, int]) -> None:
    plan = plan_for(gpu_bytes, cpu_bytes=plan_for({}).minimum_cpu_bytes)
    with pytest.raises(BudgetError, match="the libraries take") as caught:
        fit_to_runtime(plan, CHECKPOINT, 4 * GIB)
    assert ("--gpu-memory 0" in caught.value.hint) is bool(gpu_bytes)
