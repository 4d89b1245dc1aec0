"""An expert's first matrix is multiplied while the second is still being read."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.types import ExpertKey, SwitchCheckpoint
from switchrun.dtypes import Dtype
from switchrun.errors import CorruptCheckpointError
from switchrun.experts.packed import ArrivingMatrix, multiply
from switchrun.experts.reader import FileReader, Segment, Way
from tests.support.caches import keys, make_cache
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config

#: Two reads in turn bring `wi`, which is 16 KiB, and two or more `wo`.
CHUNK = 8192
WAY = Way(1, CHUNK, False)


@pytest.fixture(scope="module", params=[False, True], ids=["one file", "shards"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SwitchCheckpoint:
    folder = tmp_path_factory.mktemp("arriving") / "model"
    model = random_model(tiny_config(d_model=64, d_ff=64))
    save_checkpoint(model, folder, sharded=request.param)
    return open_checkpoint(str(folder), cache_dir=folder / "index")


class Gate:
    """Holds up all reads after the first `before` until it is opened, or has them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: int) -> None:
        self.open = threading.Event()
        self.error: Exception | None = None
        self.before = before
        self._read_piece = FileReader._read_piece
        gate = self

        def read_piece(reader: FileReader, piece: Segment, target: memoryview) -> None:
            if gate.before == 0:
                assert gate.open.wait(10)
                if gate.error is not None:
                    raise gate.error
            else:
                gate.before -= 1
            gate._read_piece(reader, piece, target)

        monkeypatch.setattr(FileReader, "_read_piece", read_piece)


@pytest.fixture
def expected(checkpoint: SwitchCheckpoint) -> Iterator[dict[ExpertKey, Any]]:
    with make_cache(checkpoint, 4, way=WAY) as cache:
        streamed = cache.stream(keys(0, 1, 2, 3))
        yield {key: (multiply(torch.eye(64), each.wi), multiply(torch.eye(64), each.wo)) for key, each in streamed}


def test_wi_is_multiplied_before_wo_has_been_read(
    checkpoint: SwitchCheckpoint, expected: dict[ExpertKey, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (key,) = keys(0)
    with make_cache(checkpoint, 2, way=WAY) as cache:
        gate = Gate(monkeypatch, before=checkpoint.experts[key].wi.nbytes // CHUNK + 1)
        stream = cache.stream([key])
        given, weights = next(stream)
        assert given == key
        assert isinstance(weights.wo, ArrivingMatrix)
        assert torch.equal(multiply(torch.eye(64), weights.wi), expected[key][0])
        threading.Timer(0.2, gate.open.set).start()
        assert torch.equal(multiply(torch.eye(64), weights.wo), expected[key][1])
        assert gate.open.is_set()
        assert next(stream, None) is None  # it is given once
        assert cache.counters().wait_seconds > 0.1
        assert (cache.counters().loads, cache.counters().load_bytes) == (1, checkpoint.expert_bytes)
        ((_, again),) = cache.stream([key])
        assert torch.equal(multiply(torch.eye(64), again.wo), expected[key][1])
        assert isinstance(again.wo, torch.Tensor)
        assert cache.counters().hits == 1


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_each_expert_is_given_once_whatever_has_arrived(
    checkpoint: SwitchCheckpoint, expected: dict[ExpertKey, Any], slots: int
) -> None:
    with make_cache(checkpoint, slots, way=WAY) as cache:
        for _ in range(20):
            cache.clear()
            seen = []
            for key, weights in cache.stream(keys(0, 1, 2, 3)):
                seen.append(key)
                assert torch.equal(multiply(torch.eye(64), weights.wi), expected[key][0])
                assert torch.equal(multiply(torch.eye(64), weights.wo), expected[key][1])
            assert sorted(seen) == keys(0, 1, 2, 3)


@pytest.mark.parametrize("slots", [1, 2])
def test_what_keeps_wo_from_coming_is_told_and_the_cache_goes_on(
    checkpoint: SwitchCheckpoint, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    with make_cache(checkpoint, slots, way=WAY) as cache:
        with monkeypatch.context() as patched:
            gate = Gate(patched, before=3)
            stream = cache.stream(keys(0, 1))
            _, weights = next(stream)
            gate.error = CorruptCheckpointError("the disk is gone")
            gate.open.set()
            with pytest.raises(CorruptCheckpointError, match="the disk is gone"):
                multiply(torch.eye(64), weights.wo)
            stream.close()
        assert not cache._table.entries
        assert len(list(cache.stream(keys(0, 1, 2)))) == 3


def test_two_may_be_begun_with_before_either_is_whole(
    checkpoint: SwitchCheckpoint, expected: dict[ExpertKey, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should `wo` not be asked for, the stream goes on to the next; each expert is given once all the same."""
    first, second = keys(0, 1)
    begin, end = threading.Event(), threading.Event()
    read_piece = FileReader._read_piece

    def late(reader: FileReader, piece: Segment, target: memoryview) -> None:
        ours = {key: checkpoint.experts[key].wo for key in (first, second)}
        if any(piece.file == wo.file and piece.offset + piece.needed == wo.offset + wo.nbytes for wo in ours.values()):
            assert end.wait(10)
        elif first.expert not in seen:
            wi = checkpoint.experts[second].wi
            if piece.file == wi.file and wi.offset <= piece.offset < wi.offset + wi.nbytes:
                assert begin.wait(10)
        read_piece(reader, piece, target)

    seen: list[int] = []
    with make_cache(checkpoint, 2, way=Way(8, CHUNK, False)) as cache:
        monkeypatch.setattr(FileReader, "_read_piece", late)
        halves = []
        for key, weights in cache.stream([first, second]):
            assert isinstance(weights.wo, ArrivingMatrix)
            assert torch.equal(multiply(torch.eye(64), weights.wi), expected[key][0])
            seen.append(key.expert)
            halves.append((key, weights.wo))
            begin.set()
            if len(seen) == 2:
                end.set()
        assert seen == [0, 1]
        for key, wo in halves:
            assert torch.equal(multiply(torch.eye(64), wo), expected[key][1])
        assert set(cache._table.entries) == {first, second}


def test_a_stream_may_be_left_before_wo_has_come(checkpoint: SwitchCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_cache(checkpoint, 1, way=WAY) as cache:
        gate = Gate(monkeypatch, before=3)
        stream = cache.stream(keys(0, 1))
        next(stream)
        gate.open.set()
        stream.close()
        assert set(cache._table.entries) <= {*keys(0)}
        assert len(list(cache.stream(keys(0, 1, 2)))) == 3


def test_a_converted_expert_is_given_whole(checkpoint: SwitchCheckpoint) -> None:
    with make_cache(checkpoint, 2, Dtype.BF16, way=WAY) as cache:
        for _ in range(5):
            cache.clear()
            assert all(isinstance(weights.wo, torch.Tensor) for _, weights in cache.stream(keys(0, 1, 2, 3)))
