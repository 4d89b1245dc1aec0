"""Whatever the budgets: what is promised holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchrun.checkpoint.names import mlp_prefix
from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.errors import BudgetError, UsageError
from switchrun.machine import gpus, ram
from switchrun.machine.gpus import Gpu
from switchrun.planning import Budgets, Plan, memory, resolve_budgets
from switchrun.planning.device_map import read_device_map, tier_of
from switchrun.planning.memory import module_of
from switchrun.planning.options import OpenOptions
from switchrun.planning.planner import fit_to_runtime, make_plan
from switchrun.units import GIB, MIB
from tests.planning.made_up import checkpoints, made_up_checkpoint

PLENTY = 1 << 50
SHAPES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["auto", "fp32", "bf16", "int8", "nf4"]),
        "batch_size": st.integers(1, 4) | st.just("auto"),
        "num_beams": st.integers(1, 4),
    }
)


def bounds(checkpoint: SwitchCheckpoint, **options: object) -> tuple[int, int]:
    plan = make_plan(checkpoint, Budgets(PLENTY), **options)  # type: ignore[arg-type]
    return plan.minimum_cpu_bytes, plan.resident_cpu_bytes


def usable_experts(plan: Plan, checkpoint: SwitchCheckpoint, tier: str) -> int:
    """Count the experts of the layers whose routers lie on a tier; routers on disk compute on the first GPU."""
    used = [use.tier for use in plan.tiers[:-2] if use.dense_bytes] or ["cpu"]
    on = {"disk": used[0], "cpu": "cpu"}
    places = (
        tier_of(f"{mlp_prefix(key.stack, key.block)}.router.classifier.weight", plan.device_map)
        for key in checkpoint.experts
    )
    return sum(on.get(place, place) == tier for place in places)


def check_sums(plan: Plan, checkpoint: SwitchCheckpoint) -> None:
    assert [use.tier for use in plan.tiers][-2:] == ["cpu", "disk"]
    for use in plan.tiers[:-1]:
        assert use.budget_bytes is not None
        assert 0 <= use.total_bytes <= use.budget_bytes
        assert use.expert_bytes == use.expert_slots * use.slot_bytes
        parts = use.dense_bytes + use.expert_bytes + use.activation_bytes + use.overhead_bytes
        assert use.total_bytes == parts
    for use in plan.tiers[:-2]:
        assert use.expert_slots <= usable_experts(plan, checkpoint, use.tier)
    cpu, disk = plan.tier("cpu"), plan.tier("disk")
    assert 1 <= cpu.expert_slots <= len(checkpoint.experts)
    assert cpu.slot_bytes > 0
    assert disk.expert_bytes == len(checkpoint.experts) * checkpoint.expert_bytes
    # Every dense weight is somewhere, once.
    assert sum(use.dense_bytes for use in plan.tiers) == sum(placed.bytes for placed in plan.placements)
    assert {placed.module for placed in plan.placements} == {module_of(name) for name in checkpoint.dense}


@given(
    checkpoint=checkpoints(),
    options=SHAPES,
    where=st.floats(0, 1.2),
    gpus=st.dictionaries(st.integers(0, 3), st.floats(0, 1.5), max_size=4),
)
def test_no_tier_is_over_its_budget(
    checkpoint: SwitchCheckpoint, options: dict[str, object], where: float, gpus: dict[int, float]
) -> None:
    minimum, resident = bounds(checkpoint, **options)
    cpu = minimum + int((resident - minimum) * where)
    sizes = {number: 1 + int(share * resident) for number, share in gpus.items()}
    plan = make_plan(checkpoint, Budgets(cpu, sizes), **options)  # type: ignore[arg-type]
    check_sums(plan, checkpoint)
    for use in plan.tiers[:-2]:
        if use.dense_bytes:
            assert use.expert_slots >= min(memory.GPU_RESERVED_SLOTS, usable_experts(plan, checkpoint, use.tier)) > 0
        else:
            assert use.total_bytes == 0
    unused = [use.tier for use in plan.tiers[:-2] if not use.dense_bytes]
    assert [note.split(" ")[0] for note in plan.notes] == unused
    assert plan.gpus == tuple(int(use.tier[4:]) for use in plan.tiers[:-2] if use.tier not in unused)
    assert set(plan.gpus) == {tier.gpu for tier in plan.device_map.values() if tier.gpu is not None}


@given(checkpoint=checkpoints(), options=SHAPES)
def test_the_minimum_is_the_least_that_works(checkpoint: SwitchCheckpoint, options: dict[str, object]) -> None:
    minimum, _ = bounds(checkpoint, **options)
    plan = make_plan(checkpoint, Budgets(minimum), **options)  # type: ignore[arg-type]
    check_sums(plan, checkpoint)
    assert plan.minimum_cpu_bytes == minimum
    with pytest.raises(BudgetError) as caught:
        make_plan(checkpoint, Budgets(minimum - 1), **options)  # type: ignore[arg-type]
    named = -(-minimum // MIB)
    assert f"needs at least {named} MiB of CPU memory" in caught.value.message
    assert f"--cpu-memory {named}MiB" in caught.value.hint
    # What the message says must work when it is typed.
    budgets = resolve_budgets(f"{named}MiB", 0)
    check_sums(make_plan(checkpoint, budgets, **options), checkpoint)  # type: ignore[arg-type]


@given(checkpoint=checkpoints(), options=SHAPES)
def test_resident_means_everything_is_in_memory(checkpoint: SwitchCheckpoint, options: dict[str, object]) -> None:
    _, resident = bounds(checkpoint, **options)
    plan = make_plan(checkpoint, Budgets(resident), **options)  # type: ignore[arg-type]
    assert plan.tier("cpu").expert_slots == len(checkpoint.experts)
    assert plan.tier("disk").dense_bytes == 0
    assert plan.tier("cpu").total_bytes == resident
    one_less = make_plan(checkpoint, Budgets(resident - 1), **options)  # type: ignore[arg-type]
    less = one_less.tier("cpu").expert_slots < len(checkpoint.experts) or one_less.tier("disk").dense_bytes > 0
    assert less


@given(checkpoint=checkpoints(), where=st.floats(0, 1.5), gpu=st.none() | st.floats(0, 1.5), beams=st.integers(1, 3))
def test_auto_takes_from_slots_alone_and_half_at_most(
    checkpoint: SwitchCheckpoint, where: float, gpu: float | None, beams: int
) -> None:
    minimum, resident = bounds(checkpoint, num_beams=beams)
    assert bounds(checkpoint, num_beams=beams, batch_size="auto") == (minimum, resident)
    gpu_bytes = {} if gpu is None else {0: 1 + int(gpu * resident)}
    budgets = Budgets(minimum + int((resident - minimum) * where), gpu_bytes)
    one, auto = (make_plan(checkpoint, budgets, batch_size=size, num_beams=beams) for size in (1, "auto"))
    assert (auto.batch_size, auto.sure_rows, auto.placements) == ("auto", 1, one.placements)
    for before, after in zip(one.tiers, auto.tiers, strict=True):
        assert after.dense_bytes == before.dense_bytes
        assert after.expert_slots >= before.expert_slots // 2
        more = after.activation_bytes - before.activation_bytes
        assert more >= 0
        if before.expert_slots == len(checkpoint.experts):
            assert after.expert_slots == before.expert_slots, "every expert stays in memory if it can"
    assert len({use.activation_bytes for use in auto.tiers if use.activation_bytes}) == 1, "a batch fits everywhere"
    assert memory.least_activation_bytes(checkpoint, auto) == one.tier("cpu").activation_bytes


def test_auto_reserves_no_more_than_is_useful() -> None:
    checkpoint = made_up_checkpoint(d_model=512, d_ff=2048)
    plan = make_plan(checkpoint, Budgets(PLENTY), batch_size="auto")
    rows = memory.BatchShape(memory.MOST_ROWS, memory.ROW_TOKENS, memory.ROW_TOKENS)
    assert plan.tier("cpu").activation_bytes == memory.activation_bytes(checkpoint, plan.precision, rows)
    assert memory.has_room(checkpoint, plan, rows)


def test_libraries_that_are_larger_than_planned_take_from_the_rows_first() -> None:
    checkpoint = made_up_checkpoint(d_model=512, d_ff=2048, num_experts=32)
    minimum, _ = bounds(checkpoint)
    plans = [make_plan(checkpoint, Budgets(minimum + 200 * MIB), batch_size=size) for size in (1, "auto")]
    one, auto = plans
    more = auto.tier("cpu").activation_bytes - one.tier("cpu").activation_bytes
    expected = memory.opened_bytes(checkpoint, auto.precision)
    for surplus in (0, MIB, more // 2, more, more + 20 * MIB, 3 * more):
        try:
            small = fit_to_runtime(one, checkpoint, expected + surplus)
        except BudgetError:
            with pytest.raises(BudgetError):
                fit_to_runtime(auto, checkpoint, expected + surplus)
            continue
        use = fit_to_runtime(auto, checkpoint, expected + surplus).tier("cpu")
        assert use.total_bytes <= (use.budget_bytes or 0)
        assert use.activation_bytes >= one.tier("cpu").activation_bytes
        assert use.expert_slots >= min(auto.tier("cpu").expert_slots, small.tier("cpu").expert_slots)


@given(checkpoint=checkpoints(), first=st.floats(0, 1.2), second=st.floats(0, 1.2))
def test_more_memory_never_gives_less(checkpoint: SwitchCheckpoint, first: float, second: float) -> None:
    minimum, resident = bounds(checkpoint)
    budgets = sorted(minimum + int((resident - minimum) * share) for share in (first, second))
    small, large = (make_plan(checkpoint, Budgets(budget)) for budget in budgets)
    assert large.tier("disk").dense_bytes <= small.tier("disk").dense_bytes
    if small.tier("disk").dense_bytes == 0:
        assert large.tier("cpu").expert_slots >= small.tier("cpu").expert_slots


@given(checkpoint=checkpoints(), where=st.floats(0, 1))
def test_under_pressure_the_encoder_leaves_memory_first(checkpoint: SwitchCheckpoint, where: float) -> None:
    """Unlike accelerate, which fills memory in the order of the modules: the decoder is used for every token."""
    minimum, resident = bounds(checkpoint)
    plan = make_plan(checkpoint, Budgets(minimum + int((resident - minimum) * where)))
    tiers = {placed.module: placed.tier for placed in plan.placements}
    if any(tier == "disk" for module, tier in tiers.items() if not module.startswith("encoder")):
        assert all(tier == "disk" for module, tier in tiers.items() if module.startswith("encoder"))
    for stack in ("encoder", "decoder"):
        blocks = sorted((int(m.split(".")[2]), tier) for m, tier in tiers.items() if m.startswith(f"{stack}.block"))
        assert [tier for _, tier in blocks] == sorted(tier for _, tier in blocks)  # cpu before disk


def test_some_pressure_does_move_the_encoder() -> None:
    checkpoint = made_up_checkpoint(d_model=512, d_ff=2048)
    whole = make_plan(checkpoint, Budgets(PLENTY), device_map=read_device_map({"": "cpu"})).tier("cpu")
    # Dense weights, four slots, and a little less.
    budget = whole.total_bytes - (whole.expert_slots - 4) * whole.slot_bytes - 1
    plan = make_plan(checkpoint, Budgets(budget))
    on_disk = [placed for placed in plan.placements if placed.tier == "disk"]
    assert on_disk
    assert all(placed.module.startswith("encoder") for placed in on_disk)
    assert {placed.reason for placed in on_disk} == {"used once for each batch; no room in memory"}


@pytest.mark.parametrize(
    ("cpu", "gpu", "cpu_bytes", "gpu_bytes"),
    [
        ("6GiB", 0, 6 * GIB, {}),
        (123, 0, 123, {}),
        ("1G", "2GiB", GIB, {0: 2 * GIB}),
        ("1G", 5, GIB, {0: 5}),
        ("1G", "0", GIB, {}),
        ("1G", 0, GIB, {}),
        ("1G", "0=1GiB, 2=3GiB", GIB, {0: GIB, 2: 3 * GIB}),
        ("1G", "1=1GiB,0=0", GIB, {1: GIB}),
    ],
)
def test_options_become_budgets(
    cpu: str | int, gpu: str | int | None, cpu_bytes: int, gpu_bytes: dict[int, int]
) -> None:
    assert resolve_budgets(cpu, gpu) == Budgets(cpu_bytes, gpu_bytes)


@pytest.mark.parametrize("gpu", ["x", "0=", "=1GiB", "0=1GiB,0=2GiB", "0=1GiB,", "a=1GiB", "²=1GiB", "-1=1GiB", ""])
def test_what_is_no_gpu_budget(gpu: str) -> None:
    with pytest.raises(UsageError, match=r"is not a GPU budget|is not a size"):
        resolve_budgets("1GiB", gpu)


def test_without_an_option_most_of_what_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "available_memory_bytes", lambda: 10 * GIB)
    assert resolve_budgets(None, 0) == Budgets(8 * GIB)


def test_without_an_option_what_is_free_on_every_gpu_less_a_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (
        Gpu(0, "small", 8 * GIB, 6 * GIB),
        Gpu(1, "full", 24 * GIB, 500 * MIB),
        Gpu(3, "large", 80 * GIB, 79 * GIB),
    )
    monkeypatch.setattr(gpus, "visible_gpus", lambda: found)
    monkeypatch.setattr(gpus, "torch_cuda", lambda: "12.8")
    assert resolve_budgets("1GiB", None) == Budgets(GIB, {0: 6 * GIB - 512 * MIB, 3: 75 * GIB})
    assert resolve_budgets("1GiB", "1=2GiB") == Budgets(GIB, {1: 2 * GIB})
    monkeypatch.setattr(gpus, "torch_cuda", lambda: None)
    assert resolve_budgets("1GiB", None) == Budgets(GIB)


def test_a_driver_that_is_too_old_is_as_none_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "visible_gpus", lambda: (Gpu(0, "small", 8 * GIB, 6 * GIB),))
    monkeypatch.setattr(gpus, "torch_cuda", lambda: "12.8")
    monkeypatch.setattr(gpus, "driver_too_old", lambda: "the driver is too old")
    budgets = resolve_budgets("4GiB", None)
    assert budgets.gpu_bytes == {}
    assert budgets.notes == ("no GPU is used: the driver is too old; update it, or see switchrun doctor",)
    assert make_plan(made_up_checkpoint(), budgets).notes == budgets.notes
    assert resolve_budgets("4GiB", "0=2GiB") == Budgets(4 * GIB, {0: 2 * GIB})


@pytest.mark.parametrize("gpu_memory", [0, 1, "0", "0=6GiB,1=20GiB"])
def test_the_driver_is_asked_only_if_nothing_was_said(gpu_memory: str | int, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("asked")

    monkeypatch.setattr(gpus, "torch_cuda", asked)
    resolve_budgets("1GiB", gpu_memory)
    assert OpenOptions(gpu_memory=gpu_memory).gpu_bytes
    with pytest.raises(AssertionError):
        resolve_budgets("1GiB", None)
