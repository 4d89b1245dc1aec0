"""How reads from the Hub are paced, and how experts are read with the headers of their entries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.range_check import check_range
from switchrun.checkpoint.remote import HubClosedError, HubRanges
from switchrun.checkpoint.types import HubWay, RemoteFile
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.hub_reader import HubReader, Pace
from switchrun.experts.reader import PAGE
from switchrun.experts.source import plan_reads
from switchrun.planning.memory import buffer_for
from switchrun.units import MIB
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config
from tests.support.fake_hub import FakeHub, Fault

ID = "google/switch-tiny"


def simulate(pace: Pace, latency: float, per_connection: float, line: float) -> None:
    """Let a link deliver pieces of 8 MiB: each connection carries so much, and the line so much in all."""
    now, size = 0.0, 8 * MIB
    for _ in range(1000):
        each = 1 / (latency + size / per_connection)
        now += 1 / min(pace.connections * each, line / size)
        pace.note(size, now)


@pytest.mark.parametrize(
    ("latency", "per_connection", "line", "connections"),
    [
        (0.0, 100e6, 100e6, 8),  # a line that one connection fills
        (0.05, 12.5e6, 95e6, 8),  # eight just so
        (0.05, 12.5e6, 200e6, 16),
        (0.05, 12.5e6, 10e9, 32),  # a storage that limits each
        (0.2, 50e6, 1000e6, 32),  # far away
        (0.001, 1e6, 1e6, 8),
    ],
)
def test_pace(latency: float, per_connection: float, line: float, connections: int) -> None:
    pace = Pace()
    simulate(pace, latency, per_connection, line)
    assert pace.connections == connections


def test_a_pause_is_no_slow_read() -> None:
    pace = Pace()
    for now in (0.1, 0.2, 0.3):
        pace.note(8 * MIB, now)
    pace.restart()
    for number in range(24):
        pace.note(8 * MIB, 1000 + number / 80)
    assert pace.connections == 16
    for number in range(48):
        pace.note(8 * MIB, 2000 + number / 80)
    assert pace.connections == 8


@pytest.mark.parametrize(
    ("mib", "others", "pieces"),
    [(51, 0, 8), (51, 7, 7), (51, 100, 7), (8, 0, 4), (1, 0, 1), (200, 0, 25)],
)
def test_an_expert_alone_uses_all_connections(mib: int, others: int, pieces: int) -> None:
    with HubRanges() as ranges:
        reader = HubReader(ranges)
        reader.pieces = others
        size = reader._piece_bytes(mib * MIB)
        assert -(-mib * MIB // size) == pieces
        reader.close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.use(monkeypatch)
        yield hub


@pytest.fixture
def torch_model(tmp_path: Path) -> Callable[[], Path]:
    return lambda: save_checkpoint(random_model(tiny_config()), tmp_path / "model", container="torch")


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("container", ["torch", "safetensors"])
def test_experts_lie_where_the_plan_says(tmp_path: Path, container: str, direct: bool) -> None:
    folder = save_checkpoint(random_model(tiny_config()), tmp_path / "model", container=container)
    for slices in open_checkpoint(str(folder)).experts.values():
        plan = plan_reads(slices, direct)
        buffer = bytearray(buffer_for(slices))
        for segment in plan.segments:
            assert isinstance(segment.file, Path)
            data = segment.file.read_bytes()[segment.offset : segment.offset + segment.length]
            assert len(data) >= segment.needed
            assert segment.position + segment.length <= len(buffer)
            assert not direct or segment.offset % PAGE == segment.position % PAGE == segment.length % PAGE == 0
            buffer[segment.position : segment.position + len(data)] = data
        for tensor, position in zip(slices.ranges, plan.positions, strict=True):
            assert isinstance(tensor.file, Path)
            file = tensor.file.read_bytes()
            assert buffer[position : position + tensor.nbytes] == file[tensor.offset : tensor.offset + tensor.nbytes]
            assert container != "torch" or (tensor.header_bytes and tensor.crc is not None and position % 64 == 0)
            check_range(tensor, memoryview(buffer), position)
            if tensor.header_bytes:
                buffer[position - tensor.header_bytes + 28] ^= 1  # how long the header says that it is
                with pytest.raises(CorruptCheckpointError, match="not where its directory says"):
                    check_range(tensor, memoryview(buffer), position)


def test_both_matrices_of_an_expert_are_one_request(hub: FakeHub, torch_model: Callable[[], Path]) -> None:
    hub.add(ID, torch_model())
    with HubRanges() as ranges:
        checkpoint = open_checkpoint(ID, way=HubWay.RANGES, ranges=ranges)
        reader = HubReader(ranges)
        slices = next(iter(checkpoint.experts.values()))
        assert isinstance(slices.wi.file, RemoteFile)
        plan = plan_reads(slices, direct=True)
        assert len(plan.segments) == 1
        buffer = memoryview(bytearray(buffer_for(slices)))
        before = len(hub.requests("cdn"))
        reader.read(plan.segments, buffer)
        assert len(hub.requests("cdn")) == before + 1
        for tensor, position in zip(slices.ranges, plan.positions, strict=True):
            check_range(tensor, buffer, position)
            assert torch.frombuffer(buffer, dtype=torch.float32, offset=position, count=4).isfinite().all()
            buffer[position] ^= 1
            with pytest.raises(CorruptCheckpointError, match="checksum"):
                check_range(tensor, buffer, position)
        reader.close()


def test_what_is_abandoned_ends_at_once_and_reading_goes_on(hub: FakeHub, torch_model: Callable[[], Path]) -> None:
    hub.add(ID, torch_model())
    with HubRanges() as ranges:
        checkpoint = open_checkpoint(ID, way=HubWay.RANGES, ranges=ranges)
        reader = HubReader(ranges)
        slices = next(iter(checkpoint.experts.values()))
        plan, buffer = plan_reads(slices, direct=True), memoryview(bytearray(buffer_for(slices)))
        hub.fail(Fault(after=100, then="stall"))
        stalled = reader.begin(plan.segments, buffer)
        while not hub.requests("cdn") or not hub.requests("cdn")[-1].sent:
            pass
        reader.abandon()
        assert isinstance(stalled.exception(timeout=0), HubClosedError)
        reader.read(plan.segments, buffer)
        for tensor, position in zip(slices.ranges, plan.positions, strict=True):
            check_range(tensor, buffer, position)
        # Counted together; what had not arrived is not.
        assert hub.sent("cdn") - 100 <= ranges.traffic.bytes <= hub.sent("cdn")
        reader.close()
        with pytest.raises(HubClosedError):
            reader._ranges.read(slices.wi.file, 0, 1)  # type: ignore[arg-type]
