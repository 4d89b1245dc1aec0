"""Linear layers outside the experts in int8: which they are, equal numbers on every tier, and the bytes they take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from switchrun import Session
from switchrun.kernels.int8 import quantise_int8
from switchrun.model.records import Progress
from switchrun.planning.plan import Tier
from tests.model.test_packed import fill, is_dense_linear, logits_of, saved
from tests.support.sessions import small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

MAPS: tuple[Mapping[str, Tier], ...] = (
    {"": "cpu"},
    {"": "disk"},
    {"": "cpu", "encoder": "disk"},
    {"": "disk", "decoder.block.1.layer.0": "cpu"},
    {"": "cpu", "decoder.block.0.layer.2.mlp.wo": "disk"},
)


def open_at(folder: Path, dtype: str, device_map: Mapping[str, Tier]) -> Session:
    return Session.open(
        folder / "model", dtype=dtype, batch_size=3, device_map=device_map, offload_folder=folder / "tier"
    )


@pytest.mark.parametrize("dtype", ["int8", "nf4", "fp32"])
def test_which_layers_are_int8(tmp_path: Path, dtype: str) -> None:
    """Attention and the MLPs without experts, in either packed dtype; nothing else, and nothing in another dtype."""
    model = saved(CheckpointSpec(tied=False), tmp_path / "model")
    with open_at(tmp_path, dtype, {"": "cpu"}) as session:
        there = dict(session.engine.model.named_parameters())
    expected = {name for name, _ in model.named_modules() if is_dense_linear(name)} if dtype != "fp32" else set()
    # Two stacks: 4 attentions in the encoder and 8 in the decoder, and 2 + 2 blocks without experts.
    assert len(expected) == (0 if dtype == "fp32" else 12 * 4 + 4 * 2)
    found = {name.removesuffix(".weight") for name, weight in there.items() if weight.dtype == torch.int8}
    assert found == expected
    for name, weight in there.items():
        owner, _, kind = name.rpartition(".")
        if owner not in expected:
            assert weight.dtype == torch.float32, name
        elif kind == "weight":
            plain = model.get_parameter(name)
            codes, scb = torch.empty(plain.shape, dtype=torch.int8), torch.empty(plain.shape[0])
            quantise_int8(plain, codes, scb)
            assert torch.equal(weight, codes)
            assert torch.equal(there[f"{owner}.SCB"], scb)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", ["int8", "nf4"])
@pytest.mark.parametrize("stored", ["fp32", "bf16", "fp16"])
def test_the_same_numbers_on_every_tier(tmp_path: Path, dtype: str, stored: str) -> None:
    saved(CheckpointSpec(dtype=stored), tmp_path / "model")
    answers = []
    for device_map in MAPS:
        with open_at(tmp_path, dtype, device_map) as session:
            answers.append((fill(session), logits_of(session.engine.model, session)))
    for tokens, logits in answers[1:]:
        assert tokens == answers[0][0]
        assert torch.equal(logits, answers[0][1])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
@pytest.mark.parametrize("device_map", MAPS[:3])
def test_the_plan_has_the_bytes_that_are_allocated(
    tmp_path: Path, dtype: str, stored: str, device_map: Mapping[str, Tier]
) -> None:
    saved(CheckpointSpec(dtype=stored, tied=False), tmp_path / "model")
    told: list[Progress] = []
    with Session.open(
        tmp_path / "model", dtype=dtype, device_map=device_map, offload_folder=tmp_path / "tier", progress=told.append
    ) as session:
        resident = {
            weight.data_ptr(): weight.nbytes
            for weight in session.engine.model.parameters()
            if weight.device.type != "meta"
        }
        planned, checkpoint = session.plan.tier("cpu").dense_bytes, session.checkpoint
    assert sum(resident.values()) == planned
    if planned:
        assert (told[-1].done, told[-1].total) == (planned, planned)
    if device_map == {"": "disk"}:
        assert session.plan.tier("disk").dense_bytes == sum(tensor.nbytes for tensor in checkpoint.dense.values())
