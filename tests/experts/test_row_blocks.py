"""Products by blocks of rows: each block once, whoever unpacks it."""

from __future__ import annotations

import threading

import pytest
import torch

from switchrun.experts import row_blocks as module
from switchrun.experts.row_blocks import MOST_WORKERS, Unpack, linear_by_blocks

SHAPE = (1003, 64)


@pytest.fixture(params=[1, 2, 3, 16])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    threads: int = request.param
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(module, "_PRODUCT_ELEMENTS", 64 * 64)
    return min(threads, MOST_WORKERS)


def test_each_block_is_unpacked_once_into_the_buffer_of_one_thread(workers: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(SHAPE), torch.randn(3, 2, SHAPE[1])
    seen: list[int] = []
    made: list[threading.Thread] = []

    def unpacker(largest: int) -> Unpack:
        me = threading.current_thread()
        made.append(me)

        def unpack(rows: slice, buffer: torch.Tensor) -> None:
            assert threading.current_thread() is me
            assert len(buffer) == (rows.stop - rows.start) * SHAPE[1] <= largest
            seen.extend(range(rows.start, rows.stop))
            buffer.copy_(weight[rows].flatten())

        return unpack

    result = linear_by_blocks(x, SHAPE, unpacker)
    torch.testing.assert_close(result, x @ weight.T)
    assert sorted(seen) == list(range(SHAPE[0]))
    assert len(made) == workers


def test_an_error_of_any_thread_is_told_when_all_have_ended(workers: int) -> None:
    for wrong in (0, 64 * (workers - 1)):
        begun: list[int] = []
        ended: list[int] = []

        def unpacker(_largest: int, wrong: int = wrong, begun: list[int] = begun, ended: list[int] = ended) -> Unpack:
            def unpack(rows: slice, buffer: torch.Tensor) -> None:
                begun.append(rows.start)
                try:
                    buffer.zero_()
                    if rows.start == wrong:
                        raise OSError("no")
                finally:
                    ended.append(rows.start)

            return unpack

        with pytest.raises(OSError, match="no"):
            linear_by_blocks(torch.ones(1, SHAPE[1]), SHAPE, unpacker)
        assert wrong in begun
        assert sorted(begun) == sorted(ended)
