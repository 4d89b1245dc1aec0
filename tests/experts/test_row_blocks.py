"""Products by blocks of rows: each block once, whoever unpacks it."""

from __future__ import annotations

import threading

import pytest
import torch

from switchrun.kernels import row_blocks as module
from switchrun.kernels.row_blocks import _PRODUCT_ELEMENTS, MOST_WORKERS, Unpack, largest_block, linear_by_blocks
from switchrun.planning.memory import PRODUCT_SCRATCH_BYTES

SHAPE = (1003, 64)
#: The matrices of an expert, and after how many of their rows a block of 64 ends with a row.
SWITCH_C = (((6144, 2080), 2), ((2080, 6144), 1))


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


def test_the_scratch_of_an_nf4_product_is_what_the_plan_reserves() -> None:
    """A thread has a block in float32 and its codes, two to an int32; switch-c's matrices make the largest blocks."""
    elements = max(largest_block(shape, multiple, _PRODUCT_ELEMENTS) for shape, multiple in SWITCH_C)
    assert MOST_WORKERS * (elements * 4 + (elements // 2 + 1) * 4) <= PRODUCT_SCRATCH_BYTES
