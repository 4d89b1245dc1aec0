"""Bytes are the cost, so they are counted exactly: what opening reads, and what a fill does."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from switchrun import GenerationOptions, Session
from switchrun.checkpoint.types import ExpertKey, TensorSlice
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.sessions import encode, generate, open_with_slots, oracle_for, small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

TEXTS = (
    "the <extra_id_0> sat on the <extra_id_1> .",
    "a man walks into a <extra_id_0>",
    "<extra_id_0> and salt , <extra_id_1> with the red cat and the blue dog <extra_id_2> beer <extra_id_3> mat",
)
STEPS = 6


def with_headers(tensors: Iterable[TensorSlice]) -> int:
    """Bytes of tensors, each with the header before it where its file has one."""
    return sum(tensor.header_bytes + tensor.nbytes for tensor in tensors)


@contextmanager
def routed_experts(oracle: Any) -> Iterator[list[tuple[ExpertKey, ...]]]:
    """Record, for each call of a router of the oracle, the experts chosen at each position; -1 for dropped tokens."""
    calls: list[Any] = []
    handles = []
    for stack in ("encoder", "decoder"):
        for number, block in enumerate(getattr(oracle, stack).block):
            if block.is_sparse:

                def hook(module: Any, inputs: Any, output: Any, stack: str = stack, number: int = number) -> None:
                    kept, expert = output[0].max(dim=-1)
                    calls.append((stack, number, torch.where(kept.bool(), expert, -1)))

                handles.append(block.layer[-1].mlp.router.register_forward_hook(hook))
    yield calls
    for handle in handles:
        handle.remove()


def needed_experts(oracle: Any, session: Session, texts: tuple[str, ...]) -> tuple[set[ExpertKey], int]:
    """Give the experts that real tokens are routed to, and how many a layer asks for, summed over layers and steps."""
    _, mask = encode(session, texts)
    eos = oracle.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    with routed_experts(oracle) as calls:
        rows = generate(oracle, session, texts, max_new_tokens=STEPS)
    needed: set[ExpertKey] = set()
    requests = 0
    steps: dict[int, int] = {}
    for stack, block, experts in calls:
        live = mask.bool()
        if stack == "decoder":
            step = steps[block] = steps.get(block, -1) + 1
            # A row is live while its last token is not the end: the token at `step` is this step's input.
            live = torch.tensor([[step < len(row) and (step == 0 or row[step] not in ends)] for row in rows])
        chosen = {ExpertKey(stack, block, expert) for expert in experts[live].tolist() if expert >= 0}
        needed |= chosen
        requests += len(chosen)
    return needed, requests


@pytest.mark.parametrize("container", ["safetensors", "torch"])
@pytest.mark.parametrize(("capacity", "experts", "seed"), [(64, 16, 0), (1, 16, 1), (2, 64, 2)])
def test_each_routed_expert_is_loaded_once_and_nothing_else(
    tmp_path: Path, container: str, capacity: int, experts: int, seed: int
) -> None:
    """Neither padding, nor dropped tokens, nor finished sequences cause a load: the batch has all three."""
    spec = CheckpointSpec(container=container, capacity=capacity, experts=experts, seed=seed, encoder_step=1)
    model = spec.model()
    spec.save(model, tmp_path)
    save_tiny_tokenizer(tmp_path)
    oracle = oracle_for(model, "fp32")
    with open_with_slots(tmp_path, None, batch_size=len(TEXTS)) as session:
        assert session.stats().experts.load_bytes == 0
        needed, requests = needed_experts(oracle, session, TEXTS)
        result = session.fill(TEXTS, GenerationOptions(max_new_tokens=STEPS))[0]
        assert result.experts.requests == requests
        assert result.experts.loads == len(needed)
        parts = [tensor for key in needed for tensor in session.checkpoint.experts[key]]
        assert result.experts.load_bytes == with_headers(parts)
        again = session.fill(TEXTS, GenerationOptions(max_new_tokens=STEPS))[0]
        assert (again.experts.loads, again.experts.hit_rate) == (0, 1.0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finished_rows_load_nothing(tmp_path: Path, seed: int) -> None:
    """One row ends early, the others go on: from then on only theirs are asked for."""
    spec = CheckpointSpec(experts=64, encoder_step=1, decoder_step=1, seed=seed)
    model = spec.model()
    spec.save(model, tmp_path)
    save_tiny_tokenizer(tmp_path)
    oracle = oracle_for(model, "fp32")
    with open_with_slots(tmp_path, None, batch_size=len(TEXTS)) as session:
        rows = generate(oracle, session, TEXTS, max_new_tokens=STEPS)
        # Some token that only one row has becomes an end.
        ending = next(t for row in rows for t in row[1:-1] if sum(t in other for other in rows) == 1)
        for model_ in (session.engine.model, oracle):
            model_.generation_config.eos_token_id = [1, ending]
        needed, requests = needed_experts(oracle, session, TEXTS)
        results = session.fill(TEXTS, GenerationOptions(max_new_tokens=STEPS))
        lengths = {len(result.output_ids) for result in results}
        assert len(lengths) > 1
        assert results[0].experts.requests == requests
        assert results[0].experts.loads == len(needed)


@pytest.mark.parametrize("container", ["safetensors", "torch"])
@pytest.mark.parametrize("sharded", [False, True])
def test_opening_reads_dense_weights_and_headers_only(
    tmp_path: Path, container: str, sharded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = CheckpointSpec(container=container, sharded=sharded, experts=64, encoder_step=1, decoder_step=1)
    spec.save(spec.model(), tmp_path)
    save_tiny_tokenizer(tmp_path)
    read: list[tuple[str, int, int]] = []
    preadv = os.preadv

    def counting(descriptor: int, buffers: Any, offset: int, *rest: Any) -> int:
        count = preadv(descriptor, buffers, offset, *rest)
        read.append((str(Path(f"/proc/self/fd/{descriptor}").readlink()), offset, offset + count))
        return count

    monkeypatch.setattr(os, "preadv", counting)
    open_with_slots(tmp_path, 2).close()  # imports and the index are out of the way
    read.clear()
    before = bytes_read_by_process()
    with open_with_slots(tmp_path, 2) as session:
        total = bytes_read_by_process() - before
        checkpoint = session.checkpoint
    # With its header, a dense weight is read from a multiple of 64 on.
    dense = sum(-(-tensor.header_bytes // 64) * 64 + tensor.nbytes for tensor in checkpoint.dense.values())
    experts = len(checkpoint.experts) * checkpoint.expert_bytes
    assert sum(end - start for _, start, end in read) == dense
    for slices in checkpoint.experts.values():
        for tensor in slices:
            assert not any(
                file == str(tensor.file) and start < tensor.offset + tensor.nbytes and tensor.offset < end
                for file, start, end in read
            )
    # Whatever else is read (configuration, tokenizer, cached index) is far less than the experts are.
    assert total - 2 * dense < experts / 4


def bytes_read_by_process() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("no rchar")
