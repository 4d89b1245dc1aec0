"""Which of four matrices a checkpoint stores, and what config.json says of the head: transformers is the oracle."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from switchrun import GenerationOptions
from switchrun.checkpoint import open_checkpoint
from switchrun.errors import CorruptCheckpointError
from tests.support import oracle
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.edits import edit_config
from tests.support.sessions import encode, open_with_slots, small_process

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

TEXTS = ("the <extra_id_0> sat on the <extra_id_1> .", "a man walks into a <extra_id_0>")
SHARED, HEAD = "shared.weight", "lm_head.weight"
OTHERS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD)
#: `encoder`, `decoder` and head: absent, equal to the embedding, or of its own.
STORED = ["".join(each) for each in itertools.product("-=!", repeat=3)]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(random_model(tiny_config()), tmp_path_factory.mktemp("original"))
    return save_tiny_tokenizer(folder)


def store(original: Path, folder: Path, shared: bool, stored: str, tied: bool | None) -> Path:
    save_tiny_tokenizer(folder)
    (folder / "config.json").write_text((original / "config.json").read_text())
    if tied is None:
        edit_config(folder, ("tie_word_embeddings",))
    else:
        edit_config(folder, tie_word_embeddings=tied)
    tensors = load_file(original / "model.safetensors")
    embedding = tensors[SHARED] if shared else tensors.pop(SHARED)
    for number, (name, kind) in enumerate(zip(OTHERS, stored, strict=True)):
        if kind == "=":
            tensors[name] = embedding.clone()
        elif kind == "!":
            # Another one in a few rows only, as fine-tuning leaves them.
            tensors[name] = embedding.clone()
            rows = slice(20 * number + 5, 20 * number + 25)
            tensors[name][rows] += torch.randn(20, embedding.shape[1], generator=torch.manual_seed(number))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def check(folder: Path, device_map: dict[str, str] | None = None) -> None:
    expected = oracle.load(folder)
    with open_with_slots(folder, None, num_beams=3, batch_size=2, device_map=device_map or {"": "cpu"}) as session:
        input_ids, mask = encode(session, TEXTS)
        given = {"input_ids": input_ids, "attention_mask": mask, "decoder_input_ids": torch.tensor([[0, 7]] * 2)}
        with torch.no_grad():
            torch.testing.assert_close(session.engine.model(**given).logits, expected(**given).logits)
        for beams in (1, 3):
            results = session.fill(TEXTS, GenerationOptions(max_new_tokens=6, num_beams=beams))
            wanted = oracle.answers(folder, TEXTS, 6, model=expected, num_beams=beams)
            assert [list(result.output_ids) for result in results] == wanted


def thinned(cases: list[Any]) -> list[Any]:
    """All of them, of which two thirds are slow together."""
    return [pytest.param(*case, marks=pytest.mark.slow if at % 3 else ()) for at, case in enumerate(cases)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("stored", "shared", "tied"),
    thinned(
        [
            *itertools.product(STORED, [True, False], [True]),
            *itertools.product(["---", "--!", "!!!"], [True, False], [None]),
        ]
    ),
)
def test_tied(original: Path, tmp_path: Path, stored: str, shared: bool, tied: bool | None) -> None:
    folder = store(original, tmp_path / "m", shared, stored, tied)
    if not shared and stored == "---":
        with pytest.raises(CorruptCheckpointError, match=r"shared\.weight is missing"):
            open_checkpoint(str(folder))
        return
    check(folder)


@pytest.mark.parametrize(
    ("stored", "shared"), thinned([*itertools.product([each for each in STORED if "-" not in each], [True, False])])
)
def test_untied(original: Path, tmp_path: Path, stored: str, shared: bool) -> None:
    """Transformers draws what is not stored at random, so all is."""
    check(store(original, tmp_path / "m", shared, stored, tied=False))


@pytest.mark.parametrize("stored", ["!!!", "-!-", "=-!"])
def test_on_disk(original: Path, tmp_path: Path, stored: str) -> None:
    folder = store(original, tmp_path / "m", True, stored, tied=True)
    check(folder, {"": "disk"})
    check(folder, {"": "cpu", "lm_head": "disk", "encoder.embed_tokens": "disk"})


def test_an_untied_head_is_no_embedding(original: Path, tmp_path: Path) -> None:
    folder = store(original, tmp_path / "m", False, "--!", tied=False)
    with pytest.raises(CorruptCheckpointError, match=r"shared\.weight is missing"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", OTHERS)
def test_another_shape_is_refused(original: Path, tmp_path: Path, name: str) -> None:
    folder = store(original, tmp_path / "m", True, "---", tied=True)
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {name: torch.zeros(100, 16)}, folder / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match="has the shape"):
        open_checkpoint(str(folder))
