"""What a fill is expected to cost."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import switchrun
from switchrun.machine import disks
from switchrun.planning import Budgets
from switchrun.planning.device_map import read_device_map
from switchrun.planning.plan import ASSUMED_BANDWIDTH, Bandwidth
from switchrun.planning.planner import GpuLevel, estimate_fill, expected_distinct, make_plan
from tests.planning.made_up import made_up_checkpoint

PLENTY = 1 << 50


@pytest.mark.parametrize(("experts", "tokens"), [(1, 1), (1, 9), (8, 1), (8, 5), (64, 24), (16, 100), (128, 0)])
def test_expected_distinct_against_simulation(experts: int, tokens: int) -> None:
    rounds = 4000
    draw = random.Random(0)
    seen = [len({draw.randrange(experts) for _ in range(tokens)}) for _ in range(rounds)]
    assert expected_distinct(experts, tokens) == pytest.approx(sum(seen) / rounds, rel=0.02, abs=1e-9)


def simulate(slots: int, *, experts: int, layers: int, batch: int, tokens_in: int, tokens_out: int) -> tuple[int, int]:
    """Count the loads of one fill with a least-recently-used cache, encoder and decoder apart."""
    draw = random.Random(1)
    held: list[tuple[str, int, int]] = []
    loads = {"encoder": 0, "decoder": 0}

    def visit(stack: str, layer: int, tokens: int) -> None:
        for expert in {draw.randrange(experts) for _ in range(tokens)}:
            key = (stack, layer, expert)
            if key in held:
                held.remove(key)
            else:
                loads[stack] += 1
            held.append(key)
            del held[:-slots]

    for layer in range(layers):
        visit("encoder", layer, batch * tokens_in)
    for _ in range(tokens_out):
        for layer in range(layers):
            visit("decoder", layer, batch)
    return loads["encoder"], loads["decoder"]


class Level:
    """A least-recently-used cache that counts what it has not, and asks the next level for it."""

    def __init__(self, slots: int, behind: Level | None = None) -> None:
        self.slots, self.behind = slots, behind
        self.held: list[tuple[str, int, int]] = []
        self.loads = 0

    def ask(self, key: tuple[str, int, int]) -> None:
        if key in self.held:
            self.held.remove(key)
        else:
            self.loads += 1
            if self.behind is not None:
                self.behind.ask(key)
        self.held.append(key)
        del self.held[: -self.slots]


# What a generation uses of a layer: 12 experts at batch size 1, of 256.
@pytest.mark.parametrize(
    ("gpus", "slots"),
    [
        ([(8, 200)], 4),  # the GPU holds all, and the CPU next to nothing
        ([(8, 4)], 200),  # the CPU holds all
        ([(8, 60)], 60),  # together they could hold all, but they hold the same
        ([(8, 4)], 4),
        ([(4, 100), (2, 4)], 70),  # one GPU holds its layers', the CPU those of the other and of the layers it computes
        ([(4, 100), (2, 4)], 20),
    ],
)
def test_two_levels_against_simulated_caches(gpus: list[tuple[int, int]], slots: int) -> None:
    experts, layers, tokens_in, tokens_out = 256, 8, 24, 12
    checkpoint = made_up_checkpoint(num_experts=experts, step=1, layers=(layers, layers), d_model=8, d_ff=16)
    estimate = estimate_fill(
        checkpoint,
        batch_size=1,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        expert_slots=slots,
        dense_disk_bytes={"decoder.block.0": 10},
        gpu_levels=[GpuLevel(held, 0, count) for count, held in gpus],
        kept_bytes=1000,
    )
    cpu = Level(slots)
    on_gpu = [Level(held, cpu) for _, held in gpus]
    of_layer = [level for level, (count, _) in zip(on_gpu, gpus, strict=True) for _ in range(count)]
    of_layer += [cpu] * (layers - len(of_layer))
    draw = random.Random(2)
    for _ in range(tokens_out):
        for layer, level in enumerate(of_layer):
            level.ask(("decoder", layer, draw.randrange(experts)))
    assert estimate.decoder_expert_loads == pytest.approx(cpu.loads, rel=0.06)
    assert estimate.gpu_expert_loads == pytest.approx(sum(level.loads for level in on_gpu), rel=0.06)
    copied = estimate.gpu_load_bytes - 10 * tokens_out  # the dense weights on disk pass through the GPU as well
    assert copied == pytest.approx(estimate.gpu_expert_loads * 1000, abs=500)


def test_an_encoder_layer_on_a_gpu_is_copied_once() -> None:
    checkpoint = made_up_checkpoint(num_experts=256, step=1, layers=(8, 8), d_model=8, d_ff=16)
    settings = {"batch_size": 2, "input_tokens": 24, "output_tokens": 12, "expert_slots": 4, "dense_disk_bytes": {}}
    gpu = estimate_fill(checkpoint, **settings, gpu_levels=[GpuLevel(2, 8, 0)])  # type: ignore[arg-type]
    cpu = estimate_fill(checkpoint, **settings)  # type: ignore[arg-type]
    assert gpu.gpu_expert_loads == gpu.encoder_expert_loads == cpu.encoder_expert_loads
    assert (cpu.gpu_expert_loads, cpu.gpu_load_bytes) == (0, 0)


@pytest.mark.parametrize("slots", [4, 10_000])
@pytest.mark.parametrize("batch", [1, 3])
def test_expert_loads_against_a_simulated_cache(slots: int, batch: int) -> None:
    """With slots for all that a generation uses, each expert is read once; with few, at every step."""
    experts, layers, tokens_in, tokens_out = 256, 8, 24, 12
    checkpoint = made_up_checkpoint(num_experts=experts, step=1, layers=(layers, layers), d_model=8, d_ff=16)
    estimate = estimate_fill(
        checkpoint,
        batch_size=batch,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        expert_slots=slots,
        dense_disk_bytes={},
    )
    shape = {"experts": experts, "layers": layers, "batch": batch, "tokens_in": tokens_in, "tokens_out": tokens_out}
    encoder, decoder = simulate(slots, **shape)
    assert estimate.encoder_expert_loads == pytest.approx(encoder, rel=0.05)
    assert estimate.decoder_expert_loads == pytest.approx(decoder, rel=0.05)
    loads = estimate.encoder_expert_loads + estimate.decoder_expert_loads
    assert estimate.load_bytes == pytest.approx(loads * checkpoint.expert_bytes, rel=0.01)


def test_dense_weights_on_disk_are_read_for_each_token_or_once() -> None:
    checkpoint = made_up_checkpoint()
    for tier, counted in (("encoder", 1), ("decoder", 7), ("shared", 7)):
        device_map = read_device_map({"": "cpu", tier: "disk"})
        plan = make_plan(checkpoint, Budgets(PLENTY), device_map=device_map, output_tokens=7)
        on_disk = plan.tier("disk").dense_bytes
        assert on_disk > 0
        assert plan.estimate.dense_disk_bytes == on_disk * counted
    resident = make_plan(checkpoint, Budgets(PLENTY)).estimate
    assert resident.dense_disk_bytes == 0


def test_seconds_are_bytes_by_bandwidth() -> None:
    checkpoint = made_up_checkpoint()
    estimate = make_plan(
        checkpoint, Budgets(PLENTY), device_map=read_device_map({"": "disk"}), bandwidth=Bandwidth(2e6, "given")
    ).estimate
    assert estimate.read_seconds == pytest.approx((estimate.load_bytes + estimate.dense_disk_bytes) / 2e6)
    assert (estimate.bandwidth_bytes_per_second, estimate.bandwidth_source) == (2e6, "given")


def test_where_the_bandwidth_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given before measured before assumed, and a measurement is remembered for the next plan."""

    def source(disk_bandwidth: float | None = None) -> tuple[float, str]:
        estimate = switchrun.plan(cpu_memory=PLENTY, disk_bandwidth=disk_bandwidth).estimate
        return estimate.bandwidth_bytes_per_second, estimate.bandwidth_source

    assert source() == (ASSUMED_BANDWIDTH.bytes_per_second, "assumed")
    disks.remember_bandwidth(Path(switchrun.__file__), 3e9)
    assert source() == (3e9, "measured")
    assert source(5e8) == (5e8, "given")
    monkeypatch.setattr(disks, "measure_read_bandwidth", lambda ranges: 4e9)
    measured = switchrun.plan(cpu_memory=PLENTY, disk_bandwidth="measure").estimate
    assert (measured.bandwidth_bytes_per_second, measured.bandwidth_source) == (4e9, "measured")
    assert source() == (4e9, "measured")


def test_a_damaged_memory_of_bandwidths(hermetic: dict[str, str]) -> None:
    file = Path(hermetic["SWITCHRUN_CACHE"]) / "bandwidth.json"
    file.parent.mkdir(parents=True)
    for text in ("{", "[1]", '{"0:0": "fast"}', '{"0:0": null}'):
        file.write_text(text)
        assert switchrun.plan(cpu_memory=PLENTY).estimate.bandwidth_source == "assumed"


@pytest.mark.parametrize("figure", [0.0, -1e9])
def test_a_remembered_bandwidth_that_is_none(figure: float) -> None:
    disks.remember_bandwidth(Path(switchrun.__file__), figure)
    assert switchrun.plan(cpu_memory=PLENTY).estimate.bandwidth_source == "assumed"
