"""A checkpoint's own generation settings: honoured where they say how, never where they would break the answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from switchrun import GenerationOptions
from switchrun.errors import ModelError
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.sessions import generate, open_with_slots, oracle_for, small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

TEXTS = ("the <extra_id_0> sat on the <extra_id_1> .", "a man walks into a <extra_id_0>")


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True},
        {"use_cache": False},
        {"num_beams": 4, "num_return_sequences": 3},
        {"eos_token_id": None, "decoder_start_token_id": None, "pad_token_id": None},
        {"max_length": 3},
    ],
)
def test_settings_that_would_break_the_answer_do_not(tmp_path: Path, settings: dict[str, object]) -> None:
    spec = CheckpointSpec()
    model = spec.model()
    spec.save(model, tmp_path)
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    with open_with_slots(tmp_path, None, batch_size=2) as session:
        expected = generate(oracle_for(model, "fp32"), session, TEXTS, max_new_tokens=6)
        results = session.fill(TEXTS, GenerationOptions(max_new_tokens=6))
        assert [list(result.output_ids) for result in results] == expected


def test_an_unknown_activation_is_named(tmp_path: Path) -> None:
    spec = CheckpointSpec()
    spec.save(spec.model(), tmp_path)
    save_tiny_tokenizer(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dense_act_fn": "nope"}))
    with pytest.raises(ModelError, match="no activation function 'nope'"):
        open_with_slots(tmp_path, None)
