"""What the stock recipe is given, so that it can offload a checkpoint with an untied head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate_child import complete_checkpoint
from transformers import SwitchTransformersForConditionalGeneration

from switchrun.checkpoint import open_checkpoint
from tests.support.checkpoints import random_model, save_checkpoint, tiny_config


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def test_an_untied_head_gets_its_embeddings(tmp_path: Path, scratch: Path) -> None:
    """The stock recipe with everything on disk: it fails on the checkpoint as it is, and computes the same."""
    model = random_model(tiny_config(tie_word_embeddings=False)).eval()
    folder = save_checkpoint(model, tmp_path / "model", sharded=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert not [name for name in index["weight_map"] if "embed_tokens" in name]
    completed = complete_checkpoint(open_checkpoint(str(folder)), scratch)
    ids = torch.tensor([[5, 9, 1]])
    with torch.no_grad():
        expected = model(input_ids=ids, decoder_input_ids=ids).logits
        loaded = SwitchTransformersForConditionalGeneration.from_pretrained(
            completed, device_map={"": "disk"}, offload_folder=tmp_path / "disk"
        )
        assert torch.equal(loaded(input_ids=ids, decoder_input_ids=ids).logits, expected)


@pytest.mark.parametrize(("tied", "sharded"), [(True, True), (True, False), (False, False)])
def test_others_are_taken_as_they_are(tmp_path: Path, scratch: Path, tied: bool, sharded: bool) -> None:
    folder = save_checkpoint(random_model(tiny_config(tie_word_embeddings=tied)), tmp_path / "model", sharded=sharded)
    assert complete_checkpoint(open_checkpoint(str(folder)), scratch) == folder
    assert not list(scratch.iterdir())
