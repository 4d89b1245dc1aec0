"""Device maps: accelerate's format in and out, and maps that make no sense."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import switchrun
from switchrun.errors import BudgetError, UsageError
from switchrun.planning import Budgets
from switchrun.planning.device_map import check_device_map, check_layers, read_device_map, tier_of
from switchrun.planning.plan import Tier
from switchrun.planning.planner import make_plan
from switchrun.units import MIB
from tests.planning.made_up import made_up_checkpoint

PLENTY = 1 << 50


@pytest.mark.parametrize(
    ("value", "tier"),
    [
        ("cpu", "cpu"),
        ("disk", "disk"),
        (0, "gpu:0"),
        (3, "gpu:3"),
        ("0", "gpu:0"),
        ("cuda:0", "gpu:0"),
        ("cuda:12", "gpu:12"),
        ("gpu:1", "gpu:1"),
    ],
)
def test_tiers(value: object, tier: object) -> None:
    assert read_device_map({"": value}) == {"": tier}


@pytest.mark.parametrize("value", ["meta", "", "cuda:", "cuda:cpu", "cuda:²", "-1", -1, 1.5, True, None, [0], {"": 0}])
def test_what_is_no_tier(value: object) -> None:
    with pytest.raises(UsageError, match="the device map puts 'shared' on"):
        read_device_map({"shared": value})


@pytest.mark.parametrize("wrap", [False, True])
def test_a_file_may_be_a_plan_or_a_plain_map(tmp_path: Path, wrap: bool) -> None:
    plain = {"": "cpu", "encoder.block.0": "cuda:1"}
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"schema_version": 1, "device_map": plain} if wrap else plain))
    assert read_device_map(path) == read_device_map(str(path)) == {"": "cpu", "encoder.block.0": "gpu:1"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "a device map is a JSON object"),
        ("{}", "a device map is a JSON object"),
        ("3", "a device map is a JSON object"),
        ('"auto"', "a device map is a JSON object"),
        ('{"device_map": {}}', "a device map is a JSON object"),
        ('{"device_map": "auto"}', "puts 'device_map' on 'auto'"),
    ],
)
def test_files_that_are_no_map(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "map.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=message):
        read_device_map(path)


@pytest.mark.parametrize("value", ["cuda:" + "9" * 5000, "9" * 5000, "x" * 5000, [[]], {"a": [[]]}])
def test_a_tier_that_is_none_is_shown_in_short(value: object) -> None:
    with pytest.raises(UsageError, match="the device map puts 'shared' on") as caught:
        read_device_map({"shared": value})
    assert len(caught.value.message) < 300


def test_a_file_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.touch()
    os.truncate(path, 1 << 40)
    for source in (path, "/dev/zero"):
        with pytest.raises(UsageError, match="is larger than 64 MiB"):
            read_device_map(source)


def test_a_map_may_come_through_a_pipe() -> None:
    """As from `--device-map <(switchrun plan --format json)`."""
    reading, writing = os.pipe()
    os.write(writing, b'{"": "cpu"}')
    os.close(writing)
    assert read_device_map(f"/proc/self/fd/{reading}") == {"": "cpu"}
    os.close(reading)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_device_map(tmp_path / "none.json")


def test_the_longest_entry_counts() -> None:
    device_map = read_device_map({"": "disk", "encoder": "cpu", "encoder.block.1": 0, "encoder.block.1.layer.0": 1})
    assert tier_of("shared.weight", device_map) == "disk"
    assert tier_of("encoder.final_layer_norm.weight", device_map) == "cpu"
    assert tier_of("encoder.block.10.layer.0.layer_norm.weight", device_map) == "cpu"
    assert tier_of("encoder.block.1.layer.1.layer_norm.weight", device_map) == "gpu:0"
    assert tier_of("encoder.block.1.layer.0.layer_norm.weight", device_map) == "gpu:1"


def test_uncovered_and_unknown_modules() -> None:
    checkpoint = made_up_checkpoint()
    with pytest.raises(UsageError, match=r"the device map has no entry for 'decoder\.block\.0\.layer"):
        make_plan(checkpoint, Budgets(PLENTY), device_map=read_device_map({"shared": "cpu", "encoder": "cpu"}))
    for module in ("encoder.block.9", "encoder.block.0.layer.0.SelfAttention.q.bias", "enc", "decoder."):
        with pytest.raises(UsageError) as caught:
            make_plan(checkpoint, Budgets(PLENTY), device_map=read_device_map({"": "cpu", module: "cpu"}))
        assert caught.value.message == f"the device map names '{module}', which this model does not have"


def test_entries_that_only_accelerate_knows() -> None:
    expert = "encoder.block.1.layer.1.mlp.experts.expert_0"
    check_device_map(read_device_map({expert: "disk", "lm_head": 0, "encoder.embed_tokens": 0}), ["shared.weight"])


def test_a_layer_computes_on_one_device() -> None:
    def check(shared: Tier, norm: Tier, wi: Tier) -> None:
        layer = "encoder.block.1.layer.1"
        check_layers(
            read_device_map({"shared.weight": shared, f"{layer}.layer_norm.weight": norm, f"{layer}.mlp.wi.weight": wi})
        )

    check("cpu", 0, 0)
    check("cpu", 1, "disk")
    check("disk", "cpu", "disk")
    with pytest.raises(UsageError, match=r"lets 'encoder\.block\.1\.layer\.1' compute on gpu:1 and gpu:0 \(put all"):
        check(0, 1, "disk")


def test_a_map_that_does_not_fit() -> None:
    checkpoint = made_up_checkpoint(d_model=1024, d_ff=4096, vocab_size=32128)
    minimum = make_plan(checkpoint, Budgets(PLENTY)).minimum_cpu_bytes
    assert (
        make_plan(checkpoint, Budgets(minimum), device_map=read_device_map({"": "disk"})).tier("cpu").expert_slots == 1
    )
    with pytest.raises(BudgetError, match=r"the device map needs \d+ MiB of CPU memory") as caught:
        make_plan(checkpoint, Budgets(minimum), device_map=read_device_map({"": "cpu"}))
    named = int(caught.value.message.split("needs ")[1].split(" MiB")[0])
    assert (
        make_plan(checkpoint, Budgets(named * MIB), device_map=read_device_map({"": "cpu"})).tier("cpu").expert_slots
        == 1
    )
    with pytest.raises(BudgetError, match="the device map needs"):
        make_plan(checkpoint, Budgets((named - 1) * MIB), device_map=read_device_map({"": "cpu"}))
    with pytest.raises(BudgetError, match=r"the device map needs .* on gpu:0, 1 MiB is allowed"):
        make_plan(
            checkpoint,
            Budgets(PLENTY, {0: MIB}),
            device_map=read_device_map({"": "cpu", "decoder": "cuda:0"} | {"lm_head": 0}),
        )


def test_a_copy_of_the_embedding_takes_memory() -> None:
    """On two tiers the embedding is there twice; sessions do place it so, and the budget must know."""
    checkpoint = made_up_checkpoint(vocab_size=32128)
    embedding = checkpoint.dense["shared.weight"].nbytes

    def cpu(**entries: str) -> int:
        device_map = {"": "disk", **{name.replace("__", "."): tier for name, tier in entries.items()}}
        return make_plan(checkpoint, Budgets(PLENTY), device_map=read_device_map(device_map)).tier("cpu").dense_bytes

    assert cpu() == 0
    assert cpu(shared="cpu") == embedding
    assert cpu(lm_head="cpu") == embedding
    assert cpu(lm_head="cpu", decoder__embed_tokens="cpu") == 2 * embedding
    assert cpu(shared="cpu", lm_head="cpu") == embedding
    passing = make_plan(
        checkpoint, Budgets(PLENTY), device_map=read_device_map({"": "cpu", "encoder.embed_tokens": "disk"})
    )
    plain = make_plan(checkpoint, Budgets(PLENTY), device_map=read_device_map({"": "cpu"}))
    assert passing.tier("cpu").overhead_bytes - plain.tier("cpu").overhead_bytes == embedding


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("gpu", [None, 200 * MIB])
def test_a_plan_is_a_device_map(tied: bool, gpu: int | None) -> None:
    """The map in a plan's JSON, given back with the same budgets, gives the same plan."""
    checkpoint = made_up_checkpoint(d_model=512, d_ff=2048, tied=tied)
    whole = make_plan(checkpoint, Budgets(PLENTY), device_map=read_device_map({"": "cpu"})).tier("cpu")
    # Dense weights, four slots, and a little less.
    budget = whole.total_bytes - (whole.expert_slots - 4) * whole.slot_bytes - 1
    budgets = Budgets(budget, {} if gpu is None else {0: gpu})
    first = make_plan(checkpoint, budgets)
    assert set(first.device_map.values()) == ({"cpu", "disk"} if gpu is None else {"gpu:0"})
    again = make_plan(checkpoint, budgets, device_map=read_device_map(json.loads(json.dumps(first.as_record()))))
    assert again.device_map == first.device_map
    assert again.tiers == first.tiers
    assert again.estimate == first.estimate


def test_through_the_api(tmp_path: Path) -> None:
    first = switchrun.plan(cpu_memory="2GiB")
    (tmp_path / "plan.json").write_text(json.dumps(first.as_record()))
    for device_map in (tmp_path / "plan.json", str(tmp_path / "plan.json"), first.device_map):
        assert switchrun.plan(cpu_memory="2GiB", device_map=device_map).device_map == first.device_map
    assert switchrun.plan(cpu_memory="2GiB", device_map="auto") == first
