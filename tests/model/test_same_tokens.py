"""The sacred test: the same tokens as plain transformers on the same weights and dtype, whatever the budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from switchrun import GenerationOptions, Session
from switchrun.kernels import blocks, plain
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.sessions import (
    encode,
    generate,
    open_with_slots,
    oracle_for,
    read_in_small_pieces,
    small_process,
)
from tests.support.strategies import CheckpointSpec, checkpoint_specs

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

TEXTS = (
    "the <extra_id_0> sat on the <extra_id_1> .",
    "a man walks into a <extra_id_0>",
    "<extra_id_0> and salt , <extra_id_1> with the red cat and the blue dog <extra_id_2> beer <extra_id_3> mat",
)
MAX_NEW_TOKENS = 8
#: bf16 keeps 8 bits: what differs by less than a few of the last one is decided by rounding.
BF16_TIE = 2.0**-6


def saved(spec: CheckpointSpec, folder: Path) -> Any:
    model = spec.model()
    spec.save(model, folder)
    save_tiny_tokenizer(folder)
    return model


ANY_OF_THESE = given(
    spec=checkpoint_specs(),
    dtype=st.sampled_from(["fp32", "bf16"]),
    slots=st.sampled_from([1, 2, 5, None]),
    own_products=st.booleans(),
    small_reads=st.booleans(),
)
SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(SETTINGS, max_examples=8)
@ANY_OF_THESE
def test_greedy_ids_and_logits(**case: Any) -> None:
    check_greedy(**case)


@pytest.mark.slow
@settings(SETTINGS, max_examples=25)
@ANY_OF_THESE
def test_greedy_ids_and_logits_of_many(**case: Any) -> None:
    check_greedy(**case)


def check_greedy(spec: CheckpointSpec, dtype: str, slots: int | None, own_products: bool, small_reads: bool) -> None:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        if own_products:  # else only weights larger than these get them
            patched.setattr(plain, "_LARGE_WEIGHT", 0)
            for module in (plain, blocks):
                patched.setattr(module, "has_bf16_instructions", lambda: False)
        if small_reads:
            read_in_small_pieces(patched)
        oracle = oracle_for(saved(spec, Path(folder)), dtype)
        with open_with_slots(Path(folder), slots, dtype=dtype, batch_size=3) as session:
            check_logits(oracle, session, dtype)
            check_ids(oracle, session, TEXTS, dtype)
            for text in TEXTS[:2]:
                check_ids(oracle, session, [text], dtype)


@settings(SETTINGS, max_examples=8)
@given(spec=checkpoint_specs(), beams=st.integers(2, 4), slots=st.sampled_from([1, 3, None]))
def test_beam_search_ids(spec: CheckpointSpec, beams: int, slots: int | None) -> None:
    with TemporaryDirectory() as folder:
        oracle = oracle_for(saved(spec, Path(folder)), "fp32")
        with open_with_slots(Path(folder), slots, dtype="fp32", batch_size=3, num_beams=beams) as session:
            expected = generate(oracle, session, TEXTS, num_beams=beams, max_new_tokens=MAX_NEW_TOKENS)
            options = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS, num_beams=beams)
            assert [list(result.output_ids) for result in session.fill(TEXTS, options)] == expected


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "device_map",
    [
        {"": "disk"},
        {"shared": "cpu", "lm_head": "disk", "encoder": "disk", "decoder": "cpu"},
        {"": "cpu", "decoder": "disk", "decoder.block.1.layer.0": "cpu", "encoder.block.0": "disk"},
        {"": "cpu", "shared": "disk"},
        {"": "cpu", "encoder.embed_tokens": "disk"},
        {"": "disk", "decoder.embed_tokens": "cpu", "lm_head": "cpu"},
    ],
)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dense_weights_on_disk(tmp_path: Path, device_map: dict[str, str], tied: bool, dtype: str) -> None:
    """Accelerate's hooks bring them in from where they lie, in any container."""
    spec = CheckpointSpec(container="torch", sharded=True, tied=tied, dtype=dtype)
    oracle = oracle_for(saved(spec, tmp_path), dtype)
    before = sorted(tmp_path.iterdir())
    with open_with_slots(tmp_path, None, dtype=dtype, batch_size=3, device_map=device_map) as session:
        check_logits(oracle, session, dtype)
        check_ids(oracle, session, TEXTS, dtype)
    assert sorted(tmp_path.iterdir()) == before  # nothing is copied or rewritten


def check_logits(oracle: Any, session: Session, dtype: str) -> None:
    input_ids, attention_mask = encode(session, TEXTS)
    arguments = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "decoder_input_ids": torch.tensor([[0, 5, 9, 127]]).repeat(len(TEXTS), 1),
    }
    there = {name: tensor.to(session.engine.device) for name, tensor in arguments.items()}
    with torch.no_grad():
        ours, theirs = session.engine.model(**there).logits.cpu(), oracle(**arguments).logits
    assert ours.dtype == theirs.dtype
    scale = theirs.abs().max().item()
    # In bf16 an expert may be chosen differently at a tie, so that a whole row differs: ids are compared instead.
    if dtype == "fp32":
        torch.testing.assert_close(ours, theirs, atol=1e-5 * scale, rtol=1e-4)


def check_ids(oracle: Any, session: Session, texts: Sequence[str], dtype: str) -> None:
    expected = generate(oracle, session, texts, max_new_tokens=MAX_NEW_TOKENS)
    results = session.fill(texts, GenerationOptions(max_new_tokens=MAX_NEW_TOKENS))
    for row, (result, ids) in enumerate(zip(results, expected, strict=True)):
        if list(result.output_ids) != ids:
            assert dtype == "bf16", f"{list(result.output_ids)} != {ids}"
            check_tie(oracle, session, texts, row, result.output_ids, ids)


def check_tie(
    oracle: Any, session: Session, texts: Sequence[str], row: int, ours: Sequence[int], theirs: Sequence[int]
) -> None:
    """Let a token differ in bf16 only where the oracle's logits of both are as close as rounding is coarse."""
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
    input_ids, attention_mask = encode(session, texts)
    with torch.no_grad():
        prefix = torch.tensor([theirs[:at]])
        logits = (
            oracle(
                input_ids=input_ids[row : row + 1].to(oracle.device),
                attention_mask=attention_mask[row : row + 1].to(oracle.device),
                decoder_input_ids=prefix.to(oracle.device),
            )
            .logits[0, -1]
            .float()
        )
    gap = (logits.max() - logits[ours[at]]).item()
    assert gap <= BF16_TIE * logits.abs().max().item(), f"token {at}: {ours[at]} is {gap} below the oracle's best"
