"""Checkpoints that are damaged, or no Switch models, or of a kind that is not supported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from switchrun.checkpoint import open_checkpoint
from switchrun.errors import CorruptCheckpointError, ModelError
from tests.support.edits import EXPERT, edit, edit_config
from tests.support.int8 import save_in_int8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (EXPERT, "is missing"),
        ("encoder.block.1.layer.1.mlp.experts.expert_3.wo.weight", "is missing"),
        ("shared.weight", "is missing"),
        ("decoder.block.1.layer.1.EncDecAttention.k.weight", "is missing"),
        ("decoder.final_layer_norm.weight", "is missing"),
        ("encoder.block.1.layer.1.mlp.router.classifier.weight", "is missing"),
    ],
)
def test_missing_tensors(folder: Path, name: str, message: str) -> None:
    edit(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        open_checkpoint(str(folder))
    assert name in caught.value.message
    assert str(folder / "model.safetensors") in caught.value.message


def test_missing_block(folder: Path) -> None:
    def lose(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("encoder.block.0.")]:
            del tensors[name]

    edit(folder, lose)
    with pytest.raises(
        CorruptCheckpointError, match=r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight is missing"
    ):
        open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (EXPERT, torch.zeros(16, 32), r"has the shape \[16, 32\]; by config.json it must be \[32, 16\]"),
        ("shared.weight", torch.zeros(100, 16), r"has the shape \[100, 16\]; by config.json it must be \[128, 16\]"),
        ("encoder.final_layer_norm.weight", torch.zeros(16).long(), "is stored as I64, not as one of BF16, F16, F32"),
        (EXPERT, torch.zeros(32, 16).double(), "is stored as F64"),
        ("encoder.block.1.layer.1.mlp.router.classifier.weight", torch.zeros(3, 16), r"must be \[4, 16\]"),
        ("encoder.block.1.layer.1.mlp.router.classifier.weight", torch.zeros(()), r"must be \[4, 16\]"),
    ],
)
def test_wrong_tensors(folder: Path, name: str, tensor: torch.Tensor, message: str) -> None:
    edit(folder, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        open_checkpoint(str(folder))
    assert name in caught.value.message
    assert str(folder / "model.safetensors") in caught.value.message


@pytest.mark.parametrize(
    "config",
    [{"d_ff": 64}, {"d_model": 0}, {"vocab_size": "many"}, {"num_heads": True}, {"d_kv": 10**4299, "num_heads": 10}],
)
def test_a_config_that_contradicts_the_tensors(folder: Path, config: dict[str, object]) -> None:
    edit_config(folder, **config)
    with pytest.raises(CorruptCheckpointError, match=r"by config\.json it must be|not a positive whole number"):
        open_checkpoint(str(folder))


def test_gated_models_are_refused(folder: Path) -> None:
    edit_config(folder, is_gated_act=True)
    with pytest.raises(ModelError, match="gated experts"):
        open_checkpoint(str(folder))
    edit_config(folder, is_gated_act=False)

    def gate(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".wi.weight")]:
            tensor = tensors.pop(name)
            tensors[name.replace(".wi.", ".wi_0.")] = tensor
            tensors[name.replace(".wi.", ".wi_1.")] = tensor.clone()

    edit(folder, gate)
    with pytest.raises(ModelError, match=r"gated experts \(wi_0, wi_1\), as switch-xxl-128"):
        open_checkpoint(str(folder))


SCALES = EXPERT.replace("weight", "SCB")
QUERY = "encoder.block.0.layer.0.SelfAttention.q."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(SCALES), f"tensor {SCALES} is missing"),
        (lambda t: t.pop(QUERY + "SCB"), f"tensor {QUERY}SCB is missing"),
        (lambda t: t.update({SCALES: torch.ones(16)}), rf"{SCALES} has the shape \[16\]; .* must be \[32\]"),
        (lambda t: t.update({SCALES: torch.ones(32).half()}), f"{SCALES} is stored as F16, not as F32"),
        (lambda t: t.update({EXPERT: torch.zeros(16, 32).char()}), rf"{EXPERT} has the shape \[16, 32\]"),
        (lambda t: t.update({QUERY + "weight": torch.zeros(8, 16).char()}), rf"{QUERY}weight has the shape \[8, 16\]"),
        (lambda t: t.update({"shared.weight": torch.zeros(128, 16).char()}), "shared.weight is stored as I8"),
    ],
)
def test_damaged_int8(folder: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str) -> None:
    save_in_int8(folder)
    edit(folder, change)
    with pytest.raises(CorruptCheckpointError, match=message):
        open_checkpoint(str(folder))


def test_int8_in_tiles_is_refused(folder: Path) -> None:
    save_in_int8(folder)
    edit(folder, lambda t: t.update({QUERY + "weight_format": torch.tensor(2, dtype=torch.uint8)}))
    with pytest.raises(ModelError, match=rf"{QUERY}weight is not stored row by row \(its weight_format is 2\)"):
        open_checkpoint(str(folder))


def only(prefix: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def keep(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if not name.startswith(prefix)]:
            del tensors[name]

    return keep


def test_other_models_are_refused(folder: Path) -> None:
    edit_config(folder, model_type="t5")
    with_experts = open_checkpoint(str(folder))
    assert with_experts.config["model_type"] == "switch_transformers"
    edit(folder, only("encoder.block.0"))
    with pytest.raises(ModelError, match=r"is not a Switch Transformers model \(model_type t5\)"):
        open_checkpoint(str(folder))
    edit_config(folder, model_type="switch_transformers")
    with pytest.raises(ModelError, match="none of its tensors belongs to an expert"):
        open_checkpoint(str(folder))


def test_an_encoder_alone_is_refused(folder: Path) -> None:
    edit(folder, only("encoder."))
    with pytest.raises(ModelError, match="has no decoder blocks"):
        open_checkpoint(str(folder))


def test_a_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"d_model": ')
    with pytest.raises(CorruptCheckpointError, match=r"config\.json: not valid JSON"):
        open_checkpoint(str(folder))
