"""Weights stored in several dtypes: computed in one that loses no bit, or in that of config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from switchrun import GenerationOptions
from tests.support import oracle
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.edits import edit_config
from tests.support.sessions import open_with_slots, small_process

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

TEXTS = ("the <extra_id_0> sat on the <extra_id_1> .", "a man walks into a <extra_id_0>")
#: Which weights are stored in bf16; the others are in fp32.
NARROW: dict[str, Callable[[str], bool]] = {
    "experts": lambda name: ".experts." in name,
    "the rest": lambda name: ".experts." not in name,
    "some experts": lambda name: ".expert_1." in name or ".expert_2." in name,
    "one matrix of each expert": lambda name: ".experts." in name and ".wi." in name,
    "the embedding": lambda name: name == "shared.weight",
}


@pytest.fixture(params=NARROW)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = save_tiny_tokenizer(save_checkpoint(random_model(tiny_config(d_ff=33), seed=2), tmp_path / "m"))
    path, is_narrow = folder / "model.safetensors", NARROW[request.param]
    tensors = {name: t.bfloat16() if is_narrow(name) else t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
@pytest.mark.parametrize("slots", [1, None])
def test_auto(folder: Path, dtype: str | None, slots: int | None) -> None:
    edit_config(folder, dtype=dtype)
    with open_with_slots(folder, slots, batch_size=2) as session:
        results = session.fill(TEXTS, GenerationOptions(max_new_tokens=8))
        assert session.plan.precision.name == ("bf16" if dtype == "bfloat16" else "fp32")
        assert session.checkpoint.repairs == ()
    if dtype is None:  # transformers would take that of the first tensor it meets
        edit_config(folder, dtype="float32")
    assert [list(result.output_ids) for result in results] == oracle.answers(folder, TEXTS, 8)


@pytest.mark.parametrize("packed", ["int8", "nf4"])
def test_packed(folder: Path, packed: str) -> None:
    answers = []
    for slots in (1, None):
        with open_with_slots(folder, slots, batch_size=2, dtype=packed) as session:
            results = session.fill(TEXTS, GenerationOptions(max_new_tokens=8))
            answers.append([result.output_ids for result in results])
    assert answers[0] == answers[1]
