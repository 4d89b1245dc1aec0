"""The cache on a GPU: the right bytes, no slot overwritten in use, and a miss that CPU memory answers reads no disk."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.types import ExpertKey, SwitchCheckpoint
from switchrun.dtypes import Dtype, Precision
from switchrun.errors import CorruptCheckpointError
from switchrun.experts import accelerator
from switchrun.experts.accelerator import PageLocks
from switchrun.experts.counters import total
from switchrun.experts.tiers import ExpertTiers
from switchrun.planning import memory
from tests.experts.test_cache import NUM_EXPERTS, keys, make_cache, stored
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config
from tests.support.fake_accelerator import Device, fake_gpus

EXPERT_BYTES = 2 * 16 * 32 * 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> SwitchCheckpoint:
    folder = tmp_path_factory.mktemp("gpu-cache") / "model"
    model = random_model(tiny_config(num_experts=NUM_EXPERTS))
    return open_checkpoint(str(save_checkpoint(model, folder)), cache_dir=folder / "index")


@pytest.fixture
def gpu() -> Iterator[Device]:
    with fake_gpus(None) as (device,):
        yield device


class Levels(ExpertTiers):
    """Levels with so many slots on each, and the CPU's cache with them."""

    def __init__(self, checkpoint: SwitchCheckpoint, gpu_slots: int, cpu_slots: int) -> None:
        super().__init__(make_cache(checkpoint, cpu_slots))
        self.checkpoint = checkpoint
        self.add(accelerator.device(0), gpu_slots, memory.gpu_expert_bytes(checkpoint, Precision(Dtype.FP32)))
        self.gpu = self.gpus[0]

    def ask(self, *experts: int) -> list[ExpertKey]:
        """Compute with experts on the GPU, and give the order in which they came."""
        seen = []
        for key, weights in self.gpu.stream(keys(*experts)):
            for matrix, slices in ((weights.wi, self.checkpoint.experts[key].wi), (weights.wo, None)):
                assert isinstance(matrix, torch.Tensor)
                assert matrix.device == accelerator.device(0)
                if slices is not None:
                    assert torch.equal(matrix.cpu(), stored(slices))
            assert torch.equal((weights.wo * 1.0).cpu(), stored(self.checkpoint.experts[key].wo))
            seen.append(key)
        assert sorted(seen) == keys(*sorted(experts))
        return seen

    def counted(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Give requests, hits and loads of the GPU and of the CPU; bytes must agree with the loads."""
        counters = self.counters()
        for each in counters.values():
            assert each.load_bytes == each.loads * EXPERT_BYTES
        gpu, cpu = ((each.requests, each.hits, each.loads) for each in counters.values())
        return gpu, cpu

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.cpu.close()


def test_what_leaves_the_gpu_is_still_in_cpu_memory(checkpoint: SwitchCheckpoint, gpu: Device) -> None:
    with Levels(checkpoint, 2, 4) as levels:
        levels.ask(0, 1)
        assert levels.counted() == ((2, 0, 2), (2, 0, 2))
        levels.ask(2, 3)  # the GPU's slots are used again
        assert levels.counted() == ((4, 0, 4), (4, 0, 4))
        levels.ask(0, 1)  # copied, and nothing is read
        assert levels.counted() == ((6, 0, 6), (6, 2, 4))
        levels.ask(1)  # not even asked of the CPU's level
        assert levels.counted() == ((7, 1, 6), (6, 2, 4))
        assert gpu.bytes_to_device == 6 * EXPERT_BYTES
        together = total(levels.counters())
        assert (together.requests, together.hits, together.loads) == (7, 3, 4)


def test_what_leaves_cpu_memory_is_still_on_the_gpu(checkpoint: SwitchCheckpoint, gpu: Device) -> None:
    with Levels(checkpoint, 4, 1) as levels:
        levels.ask(0, 1, 2, 3)
        levels.ask(0, 1, 2, 3)
        assert levels.counted() == ((8, 4, 4), (4, 0, 4))


def test_hits_come_first(checkpoint: SwitchCheckpoint, gpu: Device) -> None:
    with Levels(checkpoint, 4, 4) as levels:
        levels.ask(2)
        assert levels.ask(0, 1, 2)[0] == keys(2)[0]


@settings(max_examples=30, deadline=None)
@given(
    gpu_slots=st.integers(1, 4),
    cpu_slots=st.integers(1, 4),
    requests=st.lists(st.sets(st.integers(0, NUM_EXPERTS - 1), max_size=NUM_EXPERTS), max_size=8),
)
def test_any_requests(checkpoint: SwitchCheckpoint, gpu_slots: int, cpu_slots: int, requests: list[set[int]]) -> None:
    """The fake GPU raises if a slot is overwritten in use, or read before it is written."""
    with fake_gpus(None) as (gpu,), Levels(checkpoint, gpu_slots, cpu_slots) as levels:
        allocated = gpu.allocated
        for experts in requests:
            levels.ask(*experts)
        (asked, hits, copies), (missed, cpu_hits, reads) = levels.counted()
        assert asked == sum(map(len, requests))
        assert asked - hits == copies == missed == cpu_hits + reads
        assert gpu.allocated == allocated  # slots are allocated once


@pytest.mark.parametrize("gpu_slots", [1, 2, 4])
@pytest.mark.parametrize("given", [0, 1, 3, 5])
def test_a_caller_that_stops_early(checkpoint: SwitchCheckpoint, gpu: Device, gpu_slots: int, given: int) -> None:
    with Levels(checkpoint, gpu_slots, 2) as levels:
        levels.ask(5)
        stream = levels.gpu.stream(keys(*range(6)))
        for _ in range(given):
            next(stream)
        stream.close()
        for _ in range(2):
            levels.ask(*range(NUM_EXPERTS))


@pytest.mark.parametrize("gpu_slots", [1, 2, 3])
def test_the_next_expert_is_copied_while_one_is_computed(
    checkpoint: SwitchCheckpoint, gpu: Device, gpu_slots: int
) -> None:
    """A copy waits for what its slot was used for, and not for the expert before; a single slot leaves no choice."""
    with Levels(checkpoint, gpu_slots, 8) as levels:
        levels.ask(*range(6))
        # Each expert is two copies; nothing has been computed when the first one is copied.
        assert gpu.overlapping_copies == (2 * 5 if gpu_slots > 1 else 0)
        assert gpu.side_copies == 2 * 6


@pytest.mark.parametrize("gpu_slots", [1, 2])
def test_a_signal_while_a_copy_is_on_its_way(
    checkpoint: SwitchCheckpoint, gpu: Device, gpu_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Levels(checkpoint, gpu_slots, 2) as levels:
        levels.ask(5)
        stream = levels.gpu.stream(keys(0, 1, 2))
        next(stream)

        def interrupt(_: torch.Tensor) -> None:
            if gpu.pending:  # between the two matrices of an expert
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(levels.gpu._locks, "lock", interrupt)
            with pytest.raises(KeyboardInterrupt):
                next(stream)
        assert gpu.pending == 0
        levels.ask(*range(NUM_EXPERTS))


def test_closing_while_a_copy_is_on_its_way(checkpoint: SwitchCheckpoint, gpu: Device) -> None:
    with Levels(checkpoint, 2, 2) as levels:
        with contextlib.closing(levels.cpu.begin(keys(0))) as arrivals:
            _, weights = next(arrivals)
            levels.gpu._copy(weights, 0)
            assert gpu.pending == 2
            levels.gpu.close()
        assert gpu.pending == 0
        assert gpu.allocated == 0


def test_an_expert_that_cannot_be_read(tmp_path: Path, gpu: Device) -> None:
    folder = save_checkpoint(random_model(tiny_config(num_experts=NUM_EXPERTS)), tmp_path / "model")
    checkpoint = open_checkpoint(str(folder))
    last = max(checkpoint.experts, key=lambda key: max(part.offset for part in checkpoint.experts[key]))
    with Levels(checkpoint, 2, 2) as levels:
        file = checkpoint.experts[last].wi.file
        with file.open("r+b") as opened:
            opened.truncate(max(part.offset for part in checkpoint.experts[last]) + 8)
        with pytest.raises(CorruptCheckpointError, match="truncated"):
            list(levels.gpu.stream([last]))
        levels.ask(*(each.expert for each in keys(*range(NUM_EXPERTS)) if each != last))


def test_slots_that_are_given_up(checkpoint: SwitchCheckpoint, gpu: Device) -> None:
    with Levels(checkpoint, 5, 8) as levels:
        levels.ask(*range(5))
        slot = gpu.allocated // 5
        for left in (2, 1):
            assert levels.shrink()
            assert levels.gpu.num_slots == left
            assert gpu.allocated == left * slot
            levels.ask(*range(NUM_EXPERTS))
        assert not levels.shrink()
        assert levels.gpu.num_slots == 1


def test_clearing_forgets_both_levels(checkpoint: SwitchCheckpoint, gpu: Device) -> None:
    with Levels(checkpoint, 4, 4) as levels:
        levels.ask(0, 1)
        levels.clear()
        levels.ask(0, 1)
        assert levels.counted() == ((4, 0, 4), (4, 0, 4))
    assert gpu.allocated == 0


class Runtime:
    """CUDA's runtime as far as page-locking goes, on the second GPU: the first is not to be woken."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.current = 0
        self.locked: list[tuple[int, int]] = []

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        assert (flags, self.current) == (1, 1)  # for all GPUs
        if len(self.locked) == self.room:
            return 2
        self.locked.append((start, size))
        return 0

    def cudaHostUnregister(self, start: int) -> int:  # noqa: N802 - CUDA's name
        assert self.current == 1
        self.locked = [each for each in self.locked if each[0] != start]
        return 0

    @contextlib.contextmanager
    def device(self, place: torch.device) -> Iterator[None]:
        self.current = place.index
        yield
        self.current = 0


@pytest.mark.parametrize("room", [2, 1])
def test_slots_are_page_locked_when_they_are_first_copied_from(
    checkpoint: SwitchCheckpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, room: int
) -> None:
    runtime: Any = Runtime(room)
    woken: list[int] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", runtime.device)
    monkeypatch.setattr(accelerator, "wake", woken.append)
    with make_cache(checkpoint, 3) as cache:
        locks = PageLocks(cache.memory, cache.slot_bytes, torch.device("cuda", 1))
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                for _, weights in cache.stream(keys(0, 1)):
                    assert isinstance(weights.wi, torch.Tensor)
                    assert isinstance(weights.wo, torch.Tensor)
                    locks.lock(weights.wi)
                    locks.lock(weights.wo)
        starts = sorted(start for start, _ in runtime.locked)
        assert [start - starts[0] for start in starts] == [0, cache.slot_bytes][:room]
        assert {size for _, size in runtime.locked} == {cache.slot_bytes}
        if room < 2:
            # Refused once, it is not tried again, and CUDA has told somebody of the error.
            assert caplog.messages == ["memory cannot be page-locked (CUDA error 2): copies to the GPU take longer"]
            assert woken == [1]
        locks.close()
        assert runtime.locked == []
