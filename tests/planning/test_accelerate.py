"""The planner has no torch, so it is held against accelerate's own placement here, on meta-device models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import check_device_map
from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from switchrun.checkpoint.types import SwitchCheckpoint
from switchrun.dtypes import Dtype, Precision
from switchrun.experts.module import RoutingContext
from switchrun.model.build import build_model
from switchrun.planning import Budgets
from switchrun.planning.device_map import read_device_map
from switchrun.planning.plan import Tier
from switchrun.planning.planner import make_plan
from switchrun.units import MIB
from tests.planning.made_up import made_up_checkpoint

PLENTY = 1 << 50


def expert_free_model(checkpoint: SwitchCheckpoint) -> Any:
    """The model as sessions build it. Its caches are never asked for anything."""
    tiers: Any = None
    return build_model(checkpoint, Precision(Dtype.BF16), tiers, RoutingContext())


def plain_model(checkpoint: SwitchCheckpoint) -> Any:
    """The model as transformers builds it, with all experts."""
    with torch.device("meta"):
        return SwitchTransformersForConditionalGeneration(SwitchTransformersConfig.from_dict(dict(checkpoint.config)))


def expanded(device_map: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Give each tensor's tier as accelerate has it, by its rule: an entry covers what begins with it and a dot."""
    device_map = {name: tier.for_accelerate if isinstance(tier, Tier) else tier for name, tier in device_map.items()}
    tiers = {}
    for name in model.state_dict():
        entries = [entry for entry in device_map if not entry or name == entry or name.startswith(entry + ".")]
        tiers[name] = device_map[max(entries, key=len)]
    return tiers


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("step", [1, 2])
def test_the_same_where_all_fits_on_the_cpu(tied: bool, step: int) -> None:
    checkpoint = made_up_checkpoint(tied=tied, step=step)
    model = expert_free_model(checkpoint)
    theirs = infer_auto_device_map(model, max_memory={"cpu": PLENTY})
    ours = make_plan(checkpoint, Budgets(PLENTY)).device_map
    assert expanded(ours, model) == expanded(theirs, model)
    assert set(expanded(ours, model).values()) == {"cpu"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("step", [1, 2])
def test_the_same_where_all_fits_on_one_gpu(tied: bool, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = made_up_checkpoint(tied=tied, step=step)
    model = expert_free_model(checkpoint)
    theirs = infer_auto_device_map(model, max_memory={0: PLENTY, "cpu": PLENTY}, no_split_module_classes=[])
    ours = make_plan(checkpoint, Budgets(PLENTY, {0: PLENTY})).device_map
    assert expanded(ours, model) == expanded(theirs, model)
    assert set(expanded(ours, model).values()) == {0}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("gpu", [None, 60 * MIB])
def test_accelerate_accepts_every_map(tied: bool, share: float, gpu: int | None) -> None:
    checkpoint = made_up_checkpoint(tied=tied, d_model=512, d_ff=2048)
    whole = make_plan(checkpoint, Budgets(PLENTY))
    budget = whole.minimum_cpu_bytes + int((whole.resident_cpu_bytes - whole.minimum_cpu_bytes) * share)
    plan = make_plan(checkpoint, Budgets(budget, {} if gpu is None else {0: gpu}))
    model = plain_model(checkpoint)
    check_device_map(model, plan.as_record()["device_map"])
    placed = expanded(plan.device_map, model)
    assert set(placed.values()) == set(plan.as_record()["device_map"].values())
    # Tied weights are one tensor, so they lie on one tier.
    aliases = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", *(["lm_head.weight"] if tied else []))
    assert {placed[alias] for alias in aliases} == {placed["shared.weight"]}


@pytest.mark.parametrize("missing", ["shared", "decoder.embed_tokens", "encoder.block.0", "lm_head"])
def test_the_check_can_fail(missing: str) -> None:
    checkpoint = made_up_checkpoint(tied=False)
    device_map = dict(make_plan(checkpoint, Budgets(PLENTY)).device_map)
    del device_map[missing]
    with pytest.raises(ValueError, match="does not give any device"):
        check_device_map(plain_model(checkpoint), device_map)


def test_it_differs_from_accelerate_under_pressure() -> None:
    """Accelerate fills memory in the order of the modules, so that the decoder goes to disk; ours keeps the decoder."""
    checkpoint = made_up_checkpoint(d_model=512, d_ff=2048)
    model = expert_free_model(checkpoint)
    dense = sum(tensor.numel() * 2 for tensor in model.parameters())
    theirs = expanded(infer_auto_device_map(model, max_memory={"cpu": dense * 2 // 3}), model)
    whole = make_plan(checkpoint, Budgets(PLENTY), device_map=read_device_map({"": "cpu"})).tier("cpu")
    budget = whole.total_bytes - (whole.expert_slots - 4) * whole.slot_bytes - 1
    ours = expanded(make_plan(checkpoint, Budgets(budget)).device_map, model)
    assert {name.split(".")[0] for name, tier in ours.items() if tier == "disk"} == {"encoder"}
    assert any(name.startswith("decoder") for name, tier in theirs.items() if tier == "disk")
