"""Plans of models that are read from the Hub: what a fill fetches, what is kept, and who closes the connections."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import switchrun
from switchrun.checkpoint.remote import HubClosedError, HubRanges
from switchrun.checkpoint.types import ExpertKey, HubWay, RemoteFile, RemoteRepo, SwitchCheckpoint
from switchrun.errors import BudgetError
from switchrun.machine import disks, network
from switchrun.planning import Budgets, opening
from switchrun.planning.opening import PlannedModel, plan_model
from switchrun.planning.options import OpenOptions
from switchrun.planning.plan import ASSUMED_BANDWIDTH, ASSUMED_NETWORK, Bandwidth, HubState, Plan
from switchrun.planning.planner import make_plan
from switchrun.store import expert_path, model_name, open_checkpoint_store, store_folder
from switchrun.store.dense_file import DenseFile
from tests.conftest import validate
from tests.planning.made_up import made_up_checkpoint

PLENTY = 1 << 50
REPO = "google/switch-tiny"
STATE = HubState("offload", 10**12, file_bytes=5000)


def on_hub(**geometry: Any) -> SwitchCheckpoint:
    """A checkpoint of headers alone whose weights are on the Hub."""
    local = made_up_checkpoint(**geometry)
    file = RemoteFile(REPO, "c" * 40, "model.safetensors", PLENTY, "0" * 64)
    moved = {name: replace(tensor, file=file) for name, tensor in local.dense.items()}
    experts = {
        key: slices._replace(wi=replace(slices.wi, file=file), wo=replace(slices.wo, file=file))
        for key, slices in local.experts.items()
    }
    forms = ((next(iter(experts.values())), len(experts)),)
    return replace(
        local, id=REPO, revision="c" * 40, dense=moved, experts=experts, expert_forms=forms,
        hub=RemoteRepo(REPO, "c" * 40, (file, RemoteFile(REPO, "c" * 40, "config.json", 100, "1" * 40))),
    )  # fmt: skip


def planned(checkpoint: SwitchCheckpoint, cpu_bytes: int = PLENTY, **settings: Any) -> Plan:
    return make_plan(checkpoint, Budgets(cpu_bytes), **{"hub": STATE} | settings)


# The estimate.


def test_each_expert_that_is_used_is_fetched_once() -> None:
    layers, experts, tokens_in, tokens_out = 6, 64, 24, 12
    checkpoint = on_hub(num_experts=experts, step=1, layers=(layers, layers), d_model=8, d_ff=16)
    draw = random.Random(0)
    used = [
        sum(
            len({draw.randrange(experts) for _ in range(tokens)})
            for tokens in [tokens_in] * layers + [tokens_out] * layers
        )
        for _ in range(300)
    ]
    for cpu_bytes in (PLENTY, planned(checkpoint).minimum_cpu_bytes):  # also if memory forgets them meanwhile
        cost = planned(checkpoint, cpu_bytes, input_tokens=tokens_in, output_tokens=tokens_out).hub
        assert cost is not None
        assert cost.expert_loads == pytest.approx(sum(used) / len(used), rel=0.02)
        assert cost.expert_bytes == pytest.approx(cost.expert_loads * checkpoint.expert_bytes, rel=0.01)
        assert cost.dense_bytes == sum(tensor.nbytes for tensor in checkpoint.dense.values())
        assert cost.fetch_bytes == cost.dense_bytes + cost.expert_bytes
        assert cost.disk_bytes == pytest.approx(cost.dense_bytes + cost.expert_loads * STATE.file_bytes, rel=0.01)
        assert cost.seconds == cost.fetch_bytes / ASSUMED_NETWORK.bytes_per_second


def test_what_is_kept_is_not_fetched() -> None:
    checkpoint = on_hub(num_experts=64)
    total = len(checkpoint.experts)
    none, half, all_of_it = (
        planned(checkpoint, hub=replace(STATE, kept_experts=kept, kept_bytes=kept * 5000, kept_dense_bytes=dense))
        for kept, dense in ((0, 0), (total // 2, 777), (total, 777))
    )
    assert none.hub is not None
    assert half.hub is not None
    assert all_of_it.hub is not None
    assert half.hub.expert_bytes == pytest.approx(none.hub.expert_bytes / 2, abs=1)
    assert (half.hub.dense_bytes, half.hub.kept_share) == (0, 0.5)
    assert half.hub.kept_bytes == total // 2 * 5000 + 777
    assert (all_of_it.hub.fetch_bytes, all_of_it.hub.disk_bytes, all_of_it.hub.seconds) == (0, 0, 0)


def test_no_byte_is_counted_as_read_from_disk_and_fetched() -> None:
    checkpoint = on_hub(num_experts=64)
    local = make_plan(made_up_checkpoint(num_experts=64), Budgets(PLENTY)).estimate
    fresh = planned(checkpoint).estimate
    assert fresh.load_bytes == 0
    assert fresh.read_seconds == 0
    assert fresh.decoder_expert_loads == local.decoder_expert_loads
    total = len(checkpoint.experts)
    half = planned(checkpoint, hub=replace(STATE, kept_experts=total // 2)).estimate
    assert half.load_bytes == pytest.approx(local.load_bytes / 2, abs=1)
    # What memory forgets is read from disk from the second time on.
    least = planned(checkpoint).minimum_cpu_bytes
    again = planned(checkpoint, least, output_tokens=40).estimate
    settings = {"output_tokens": 40, "bandwidth": ASSUMED_BANDWIDTH}
    locally = make_plan(made_up_checkpoint(num_experts=64), Budgets(least), **settings).estimate  # type: ignore[arg-type]
    cost = planned(checkpoint, least, output_tokens=40).hub
    assert cost is not None
    assert again.load_bytes == pytest.approx(locally.load_bytes - cost.expert_bytes, abs=2)


def test_fewer_tokens_may_be_expected_than_memory_is_reserved_for() -> None:
    checkpoint = on_hub(num_experts=64)
    short = planned(checkpoint, output_tokens=12)
    long = planned(checkpoint, output_tokens=64)
    assert planned(checkpoint, output_tokens=64, hub_output_tokens=12).hub == short.hub
    assert long.hub is not None
    assert short.hub is not None
    assert (short.hub.output_tokens, long.hub.output_tokens) == (12, 64)
    assert long.hub.expert_bytes > short.hub.expert_bytes


def test_a_disk_that_is_too_small_is_a_note() -> None:
    checkpoint = on_hub()
    assert planned(checkpoint).notes == ()
    (note,) = planned(checkpoint, hub=replace(STATE, free_bytes=1 << 20)).notes
    assert re.fullmatch(r"offload has 1 MiB free, keeping what comes from the Hub takes 1.\d+ MiB", note)


def test_a_limit_bounds_what_is_kept() -> None:
    checkpoint = on_hub(num_experts=64)
    cost = planned(checkpoint, hub=replace(STATE, kept_bytes=1000, limit_bytes=21_000)).hub
    assert cost is not None
    assert cost.disk_bytes == cost.dense_bytes + 20_000


def test_the_tiers_end_with_the_hub() -> None:
    checkpoint = on_hub(num_experts=8)
    kept = len(checkpoint.experts) // 4
    plan = planned(checkpoint, hub=replace(STATE, kept_experts=kept, kept_bytes=kept * 5000))
    assert [use.tier for use in plan.tiers] == ["cpu", "disk", "hub"]
    assert plan.tier("disk").expert_bytes == kept * 5000
    assert plan.tier("hub").expert_bytes == 3 * kept * checkpoint.expert_bytes
    assert plan.tier("hub").dense_bytes == sum(tensor.nbytes for tensor in checkpoint.dense.values())
    assert set(plan.device_map.values()) == {"cpu"}
    record = plan.as_record()
    validate(json.loads(json.dumps(record)), "plan")
    assert "fetch_bytes" not in record["hub"]
    with_gpu = make_plan(checkpoint, Budgets(PLENTY, {0: PLENTY}), hub=STATE)
    assert [use.tier for use in with_gpu.tiers] == ["gpu:0", "cpu", "disk", "hub"]


# Opening.


class Opened:
    """In the place of `open_checkpoint`: answers with a checkpoint, and keeps what it was called with."""

    def __init__(self, checkpoint: SwitchCheckpoint) -> None:
        self.checkpoint = checkpoint
        self.way: HubWay | None = None
        self.ranges: HubRanges | None = None

    def __call__(self, _model: str, *, way: HubWay, ranges: HubRanges | None, **_settings: Any) -> SwitchCheckpoint:
        self.way, self.ranges = way, ranges
        return self.checkpoint

    @property
    def is_closed(self) -> bool:
        """Whether what reads from the Hub was closed."""
        assert self.ranges is not None
        file = self.checkpoint.hub.files[0] if self.checkpoint.hub else RemoteFile(REPO, "c" * 40, "x", 9, "0")
        try:
            self.ranges.read(file, 0, 1)
        except Exception as error:
            return isinstance(error, HubClosedError)
        return False


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[SwitchCheckpoint], Opened]:
    def put(checkpoint: SwitchCheckpoint) -> Opened:
        made = Opened(checkpoint)
        monkeypatch.setattr(opening, "open_checkpoint", made)
        return made

    return put


def open_plan(**settings: Any) -> PlannedModel:
    warn = settings.pop("warn", None)
    return plan_model(OpenOptions(model=REPO, offload_folder="offload", **settings), warn=warn)


def test_what_reads_from_the_hub_lives_as_long_as_the_model(opened: Callable[[SwitchCheckpoint], Opened]) -> None:
    made = opened(on_hub())
    planned = open_plan(hub="ranges")
    assert (made.way, planned.hub) == (HubWay.RANGES, made.ranges)
    assert not made.is_closed
    planned.close()
    assert made.is_closed


def test_it_is_closed_where_nobody_needs_it(opened: Callable[[SwitchCheckpoint], Opened]) -> None:
    made = opened(on_hub())
    with pytest.raises(BudgetError):
        open_plan(cpu_memory=1)
    assert made.is_closed
    made = opened(made_up_checkpoint())  # a complete local snapshot
    planned = open_plan()
    assert (planned.hub, planned.plan.hub) == (None, None)
    assert made.is_closed
    planned.close()
    made = opened(on_hub())
    assert switchrun.plan(REPO, offload_folder="offload", hub="ranges").hub is not None
    assert made.is_closed


def test_a_plan_downloads_nothing_and_says_what_a_download_takes(
    opened: Callable[[SwitchCheckpoint], Opened], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    made = opened(on_hub())
    plan = switchrun.plan(REPO, offload_folder="offload", hub="download")
    assert made.way is HubWay.RANGES
    cost = plan.hub
    assert cost is not None
    assert cost.downloads
    assert (cost.fetch_bytes, cost.disk_bytes, cost.kept_share) == (PLENTY + 100, PLENTY + 100, 0)
    assert cost.folder == str(tmp_path / "hub")
    assert plan.estimate == make_plan(on_hub(), Budgets(PLENTY)).estimate
    assert [use.tier for use in plan.tiers] == ["cpu", "disk"]
    assert len(plan.notes) == 1  # no disk is that large
    validate(json.loads(json.dumps(plan.as_record())), "plan")


def test_nothing_reads_from_the_hub_for_a_local_model() -> None:
    assert plan_model(OpenOptions()).hub is None


def test_the_user_hears_of_the_rate_limit(opened: Callable[[SwitchCheckpoint], Opened]) -> None:
    said: list[str] = []
    made = opened(on_hub())
    open_plan(warn=said.append)
    assert made.ranges is not None
    made.ranges._on_wait(287.0)  # type: ignore[misc]
    assert said == ["the Hub asks to wait 4 min 47 s"]


def test_how_fast_the_network_is(opened: Callable[[SwitchCheckpoint], Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    opened(on_hub())

    def bandwidth(**settings: Any) -> tuple[float, str]:
        cost = open_plan(**settings).plan.hub
        assert cost is not None
        return cost.bandwidth_bytes_per_second, cost.bandwidth_source

    assert bandwidth() == (12.5e6, "assumed")
    network.remember_bandwidth(63_000_000, 1.0)  # too little to tell
    assert bandwidth() == (12.5e6, "assumed")
    network.remember_bandwidth(128_000_000, 4.0)
    assert bandwidth() == (32e6, "measured")
    assert bandwidth(network_bandwidth="2MB/s") == (2e6, "given")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:secret@mirror.example/hf/")
    assert bandwidth() == (12.5e6, "assumed")
    network.remember_bandwidth(64_000_000, 64.0)
    assert bandwidth() == (1e6, "measured")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/hf")
    assert bandwidth() == (1e6, "measured")
    assert "secret" not in (Path.home() / "switchrun" / "network.json").read_text()


def test_what_the_offload_folder_keeps(opened: Callable[[SwitchCheckpoint], Opened]) -> None:
    checkpoint = on_hub()
    opened(checkpoint)
    folder = store_folder("offload", model_name(checkpoint), "bf16")
    for key in list(checkpoint.experts)[:4]:
        expert_path(folder, key).parent.mkdir(parents=True, exist_ok=True)
        expert_path(folder, key).write_bytes(b"x" * 100)
    cost = open_plan().plan.hub
    assert cost is not None
    assert (cost.kept_share, cost.kept_bytes) == (4 / len(checkpoint.experts), 400)
    assert cost.dense_bytes > 0
    assert cost.folder == str(Path("offload").absolute())
    assert cost.free_bytes == pytest.approx(disks.free_bytes(Path()), rel=0.01)
    dense = DenseFile("offload", checkpoint)
    with dense.writing() as writer:
        assert writer is not None
        for name in list(dense.tensors)[1:]:
            writer.finish(name)
        half = open_plan().plan.hub
        assert half is not None
        assert half.dense_bytes == cost.dense_bytes
        writer.finish(next(iter(dense.tensors)))
        writer.complete()
    cost = open_plan().plan.hub
    assert cost is not None
    assert (cost.dense_bytes, cost.kept_bytes) == (0, 400 + dense.file_bytes)
    # In a packed dtype, what is kept as stored is not fetched again either, and what is fetched is kept packed.
    store = open_checkpoint_store("offload", checkpoint, "int8")
    for key in list(checkpoint.experts)[3:5]:
        store.write(key, bytes(store.layout.nbytes))
    cost = open_plan(dtype="int8").plan.hub
    assert cost is not None
    assert cost.kept_share == 5 / len(checkpoint.experts)
    assert cost.kept_bytes == 300 + 2 * store.file_bytes + dense.file_bytes
    assert cost.disk_bytes == pytest.approx(cost.expert_loads * store.file_bytes, rel=0.1)


def test_the_disk_is_that_of_what_is_kept(
    opened: Callable[[SwitchCheckpoint], Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = on_hub()
    opened(checkpoint)
    monkeypatch.setattr(disks, "measure_read_bandwidth", lambda ranges: 4e9 if ranges else None)
    estimate = switchrun.plan(REPO, offload_folder="offload", disk_bandwidth="measure").estimate
    assert estimate.bandwidth_source == "assumed"  # nothing is kept: there is nothing to read
    file = expert_path(store_folder("offload", model_name(checkpoint), "bf16"), ExpertKey("encoder", 1, 0))
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x" * 100_000)
    estimate = switchrun.plan(REPO, offload_folder="offload", disk_bandwidth="measure").estimate
    assert Bandwidth(estimate.bandwidth_bytes_per_second, estimate.bandwidth_source) == Bandwidth(4e9, "measured")
