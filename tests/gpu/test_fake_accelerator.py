"""The fake GPU catches what a real one would do wrong in silence: a test on it can fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.fake_accelerator import GPUS, NAME, Device, RaceError, Stream, fake_gpus

KIB = 1024


@pytest.fixture
def gpus() -> Iterator[list[Device]]:
    with fake_gpus(64 * KIB, None) as devices:
        yield devices


def test_it_is_there_only_while_it_is_wanted(gpus: list[Device]) -> None:
    assert torch.accelerator.current_accelerator(check_available=True) == torch.device(NAME)
    assert GPUS.device_count() == 2
    gpus.clear()
    assert torch.accelerator.current_accelerator(check_available=True) is None


def test_it_computes_and_counts_bytes_each_way(gpus: list[Device]) -> None:
    x = torch.arange(12.0).view(3, 4)
    there = x.to(f"{NAME}:0")
    assert (there.device, gpus[0].bytes_to_device, gpus[0].allocated) == (torch.device(NAME, 0), 48, 512)
    back = (there @ there.T).to("cpu")
    assert torch.equal(back, x @ x.T)
    assert gpus[0].bytes_to_host == 36
    there[1] = 5.0
    assert there.sum().item() == x.sum().item() - x[1].sum().item() + 20
    del there
    assert (gpus[0].allocated, gpus[1].peak) == (0, 0)


@pytest.mark.parametrize("other", ["cpu", f"{NAME}:1"])
def test_devices_are_not_mixed(gpus: list[Device], other: str) -> None:
    here, there = torch.ones(2, device=f"{NAME}:0"), torch.ones(2, device=other)
    with pytest.raises(RuntimeError, match="same device"):
        here + there
    with pytest.raises(RuntimeError, match="same device"):
        there.add_(here)
    assert (here + torch.tensor(1.0)).sum().item() == 4  # a number may come from anywhere


def test_beyond_its_capacity_it_is_out_of_memory(gpus: list[Device]) -> None:
    first = torch.empty(40 * KIB, dtype=torch.uint8, device=f"{NAME}:0")
    with pytest.raises(torch.OutOfMemoryError, match=r"40960 bytes are wanted, 40960 of 65536 are in use"):
        torch.empty(40 * KIB, dtype=torch.uint8, device=f"{NAME}:0")
    assert first[KIB:].untyped_storage() is not None
    del first
    assert torch.empty(60 * KIB, dtype=torch.uint8, device=f"{NAME}:0").numel() == 60 * KIB
    assert gpus[0].peak == 60 * KIB


def test_memory_is_taken_from_the_driver_as_torch_takes_it(gpus: list[Device]) -> None:
    def take(mib: float) -> torch.Tensor:
        return torch.empty(int(mib * KIB * KIB), dtype=torch.uint8, device=f"{NAME}:1")

    gpu, kept, reserved = gpus[1], [], []
    for mib in (0.75, 0.75, 0.75, 7, 7, 7, 6, 10, 10.5):
        kept.append(take(mib))
        reserved.append(gpu.allocator.reserved >> 20)
    assert reserved == [2, 2, 4, 24, 24, 44, 44, 44, 56]
    kept.append(take(2.5))  # of the 3 MiB that are left in the second segment: not worth splitting
    assert (gpu.allocator.reserved >> 20, kept[-1].block.size >> 20) == (56, 3)
    assert gpu.allocated == sum(tensor.block.size for tensor in kept)
    del kept[:3]
    assert gpu.allocator.reserved >> 20 == 56
    GPUS.empty_cache()
    assert gpu.allocator.reserved >> 20 == 52
    kept.clear()
    GPUS.empty_cache()
    assert (gpu.allocator.reserved, gpu.allocated) == (0, 0)


def test_a_copy_on_a_side_stream_is_made_when_it_is_waited_for(gpus: list[Device]) -> None:
    target, source = torch.zeros(4, device=f"{NAME}:0"), torch.ones(4)
    side, compute = Stream(0), GPUS.current_stream(0)
    side.wait_event(compute.record_event())
    with GPUS.stream(side):
        target.copy_(source, non_blocking=True)
        done = side.record_event()
    with pytest.raises(RaceError, match="has yet to write"):
        target.sum()
    compute.wait_event(done)
    assert target.sum().item() == 4


def test_memory_in_use_is_not_overwritten(gpus: list[Device]) -> None:
    target, side, compute = torch.zeros(4, device=f"{NAME}:0"), Stream(0), GPUS.current_stream(0)
    event = compute.record_event()
    target.sum()
    side.wait_event(event)  # recorded too early
    with GPUS.stream(side), pytest.raises(RaceError, match="may still be using"):
        target.copy_(torch.ones(4), non_blocking=True)
    side.wait_event(compute.record_event())
    with GPUS.stream(side):
        target.copy_(torch.ones(4), non_blocking=True)
