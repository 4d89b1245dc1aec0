"""What config.json and generation_config.json may say: transformers' answer, or a refusal that names the file."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, SwitchTransformersConfig

from switchrun import GenerationOptions
from switchrun.checkpoint import generation, open_checkpoint
from switchrun.errors import CorruptCheckpointError, ModelError, SwitchrunError
from switchrun.model.settings import CONFIG_KEYS, check_settings, model_config
from tests.support import oracle
from tests.support.checkpoints import random_model, save_checkpoint, save_tiny_tokenizer, tiny_config
from tests.support.sessions import open_with_slots, small_process

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

TEXTS = ("the <extra_id_0> sat on the <extra_id_1> .", "a man walks into a <extra_id_0>")
TOKENS = 8
IDS = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_checkpoint(random_model(tiny_config(), seed=2), tmp_path_factory.mktemp("original"))
    return save_tiny_tokenizer(folder)


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model", copy_function=os.link))


def rewrite(path: Path, values: Any) -> None:
    path.unlink(missing_ok=True)  # the others are links to it
    path.write_text(json.dumps(values))


def with_generation(copy: Path, **values: Any) -> Path:
    rewrite(copy / generation.FILE, IDS | values)
    return copy


def with_config(copy: Path, **values: Any) -> Path:
    rewrite(copy / "config.json", json.loads((copy / "config.json").read_text()) | values)
    return copy


def ours(folder: Path, **options: Any) -> list[list[int]]:
    with open_with_slots(folder, None, batch_size=2, num_beams=options.get("num_beams", 1)) as session:
        results = session.fill(TEXTS, GenerationOptions(max_new_tokens=TOKENS, **options))
    return [list(result.output_ids) for result in results]


# Which settings there are


def test_every_generation_setting_is_sorted() -> None:
    sorted_ones = [*generation.KEPT, *generation.OPTIONAL, *generation.DROPPED, *generation.REFUSED]
    assert len(sorted_ones) == len(set(sorted_ones))
    assert set(GenerationConfig().__dict__) - {"_original_object_hash"} <= set(sorted_ones)


def test_every_setting_of_the_model_is_sorted() -> None:
    dropped = {
        "_attn_implementation_internal", "_experts_implementation_internal", "_name_or_path", "_output_attentions",
        "_post_init_done", "add_cross_attention", "add_router_probs", "architectures", "chunk_size_feed_forward",
        "dtype", "id2label", "initializer_factor", "is_decoder", "label2id", "output_hidden_states", "problem_type",
        "return_dict", "router_aux_loss_coef", "router_z_loss_coef", "transformers_version", "use_cache",
    }  # fmt: skip
    assert set(SwitchTransformersConfig().__dict__) == dropped | CONFIG_KEYS - {"decoder_start_token_id"}


# Generation settings

EFFECTIVE: dict[str, Any] = {
    "bad_words_ids": [[28], [122, 35]],
    "begin_suppress_tokens": list(range(3, 100)),
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0,
    "eos_token_id": [16, 122],
    "exponential_decay_length_penalty": [1, 8.0],
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 7,
    "min_length": 7,
    "min_new_tokens": 7,
    "no_repeat_ngram_size": 1,
    "repetition_penalty": 5.0,
    "sequence_bias": [[[12], 30.0]],
    "stop_strings": ["yyy", "ym"],
    "suppress_tokens": list(range(0, 128, 2)),
    "watermarking_config": {"greenlist_ratio": 0.3, "bias": 50.0},
}


#: What must be set besides, for a setting to show.
BESIDE: dict[str, dict[str, Any]] = {
    "encoder_no_repeat_ngram_size": {"suppress_tokens": sorted(set(range(128)) - {3, 61, 62, 76, 99})},
    "min_length": {"eos_token_id": [28, 99]},
    "min_new_tokens": {"eos_token_id": [28, 99]},
}


@pytest.mark.parametrize("name", EFFECTIVE)
@pytest.mark.parametrize("place", ["config.json", generation.FILE])
def test_what_changes_the_answer_is_kept(copy: Path, name: str, place: str) -> None:
    beside = BESIDE.get(name, {})
    without = oracle.answers(with_generation(copy, **beside), TEXTS, TOKENS)
    settings = {name: EFFECTIVE[name]} | beside
    (copy / generation.FILE).unlink()
    folder = with_generation(copy, **settings) if place == generation.FILE else with_config(copy, **settings)
    expected = oracle.answers(folder, TEXTS, TOKENS)
    assert expected != without, "the setting shows nothing"
    assert ours(folder) == expected


@pytest.mark.parametrize("settings", [{"length_penalty": -4.0}, {"early_stopping": True}, {"early_stopping": "never"}])
def test_what_is_about_beams_is_kept(copy: Path, settings: dict[str, Any]) -> None:
    folder = with_generation(copy, eos_token_id=list(range(60, 128)), **settings)
    assert ours(folder, num_beams=3) == oracle.answers(folder, TEXTS, TOKENS, num_beams=3)


def test_a_stop_string_with_beams(copy: Path) -> None:
    folder = with_generation(copy, stop_strings="a")
    assert ours(folder, num_beams=3) == oracle.answers(folder, TEXTS, TOKENS, num_beams=3)


def test_a_stop_string_finishes(copy: Path) -> None:
    folder = with_generation(copy, stop_strings=EFFECTIVE["stop_strings"])
    for beams in (1, 2):
        with open_with_slots(folder, None, batch_size=2, num_beams=beams) as session:
            results = session.fill(TEXTS, GenerationOptions(max_new_tokens=TOKENS, num_beams=beams))
        for result in results:
            assert (result.finish_reason == "stop") == (len(result.output_ids) <= TOKENS)


def test_sampling_settings_are_kept(copy: Path) -> None:
    folder = with_generation(copy, min_p=0.99)  # leaves the likeliest only
    assert ours(folder, sample=True) == oracle.answers(folder, TEXTS, TOKENS)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "temperature": 9.0, "top_k": 2, "top_p": 0.5},
        {"max_length": 3, "max_new_tokens": 2},
        {"pad_token_id": 10**9},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static", "use_cache": False},
        {"output_scores": True, "return_dict_in_generate": True},
        {"nobody_s": 3, "transformers_version": "0.1"},
        {"penalty_alpha": 0, "guidance_scale": 1.0, "token_healing": False, "num_beam_groups": 1, "dola_layers": None},
    ],
)
@pytest.mark.parametrize("place", ["config.json", generation.FILE])
def test_what_has_no_say_is_dropped(copy: Path, original: Path, settings: dict[str, Any], place: str) -> None:
    expected = oracle.answers(original, TEXTS, TOKENS)
    assert (
        ours(with_generation(copy, **settings) if place != "config.json" else with_config(copy, **settings)) == expected
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("constraints", [1]),
        ("dola_layers", "high"),
        ("force_words_ids", [[5]]),
        ("guidance_scale", 1.5),
        ("is_assistant", True),
        ("num_beam_groups", 2),
        ("penalty_alpha", 0.6),
        ("token_healing", True),
    ],
)
@pytest.mark.parametrize("place", ["config.json", generation.FILE])
def test_what_cannot_be_honoured_is_refused(copy: Path, name: str, value: object, place: str) -> None:
    folder = with_generation(copy, **{name: value}) if place != "config.json" else with_config(copy, **{name: value})
    with pytest.raises(ModelError, match=rf"{place}: {name} is .*, which is not supported"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["encoder_no_repeat_ngram_size", "length_penalty"])
def test_a_number_that_would_take_all_memory(copy: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f"{name} is 1000000, more than"):
        open_checkpoint(str(with_generation(copy, **{name: 1_000_000})))


def test_every_refusal_is_tested() -> None:
    tested = test_what_cannot_be_honoured_is_refused.pytestmark[1].args[1]  # type: ignore[attr-defined]
    assert {name for name, _ in tested} == set(generation.REFUSED)


@pytest.mark.parametrize("eos", [None, 40, [12, 70], True])
def test_the_end_is_what_generation_config_says_alone(copy: Path, eos: object) -> None:
    folder = with_generation(copy, eos_token_id=eos)
    with_config(copy, eos_token_id=list(range(128)))
    assert ours(folder) == oracle.answers(folder, TEXTS, TOKENS)


def test_the_end_of_config_json(copy: Path) -> None:
    folder = with_config(copy, eos_token_id=list(range(60, 128)))
    assert ours(folder) == oracle.answers(folder, TEXTS, TOKENS)
    folder = with_config(copy, eos_token_id=None)
    assert ours(folder) == oracle.answers(folder, TEXTS, TOKENS)


def test_without_a_token_to_start_with_the_usual_ones_are_taken(copy: Path, original: Path) -> None:
    expected = oracle.answers(original, TEXTS, TOKENS)
    rewrite(copy / generation.FILE, {})
    assert ours(copy) == expected


def test_a_start_token_by_another_name(copy: Path) -> None:
    rewrite(copy / generation.FILE, {"bos_token_id": 5, "eos_token_id": 1})
    assert ours(copy) == oracle.answers(copy, TEXTS, TOKENS)


@pytest.mark.parametrize("text", ["{", "[]", "", '{"eos_token_id": '])
def test_a_damaged_generation_config(copy: Path, text: str) -> None:
    (copy / generation.FILE).write_text(text)
    with pytest.raises(CorruptCheckpointError, match=generation.FILE):
        open_checkpoint(str(copy))


# The model's settings


@pytest.mark.parametrize(
    "settings",
    [
        {"_attn_implementation": "sdpa"},
        {"attn_implementation": "flash_attention_2"},
        {"_experts_implementation": "grouped_mm"},
        {"return_dict": False, "output_hidden_states": True, "output_attentions": True, "use_cache": False},
        {"torchscript": True, "chunk_size_feed_forward": 3, "name_or_path": "x"},
        {"is_decoder": True, "add_cross_attention": True, "somebody_s": 3},
    ],
)
def test_what_only_chooses_an_implementation_is_dropped(copy: Path, original: Path, settings: dict[str, Any]) -> None:
    assert ours(with_config(copy, **settings)) == oracle.answers(original, TEXTS, TOKENS)


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_norm_epsilon": 0},
        {"dropout_rate": 3},
        {"decoder_start_token_id": 128},
        {"decoder_start_token_id": -1},
        {"eos_token_id": "x"},
        {"dense_act_fn": "nope"},
        {"dense_act_fn": "prelu"},
        {"router_dtype": "int8"},
        {"relative_attention_max_distance": 0},
        {"relative_attention_max_distance": 4},
        {"tie_word_embeddings": "no"},
    ],
)
def test_a_bad_setting_is_config_json_s(copy: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"transformers does not accept .*config\.json: ") as caught:
        open_with_slots(with_config(copy, **settings), None)
    assert "tokenizer" not in str(caught.value)


def test_a_setting_that_is_bad_with_beams_only(copy: Path) -> None:
    folder = with_generation(copy, length_penalty="x")
    assert ours(folder) == oracle.answers(folder, TEXTS, TOKENS)
    with pytest.raises(ModelError, match=generation.FILE):
        open_with_slots(folder, None, num_beams=2)
    with open_with_slots(folder, None, batch_size=2) as session, pytest.raises(ModelError, match=generation.FILE):
        session.fill(TEXTS, GenerationOptions(num_beams=2))


def test_the_trial_leaves_no_trace(copy: Path) -> None:
    checkpoint = open_checkpoint(str(copy))
    before = torch.random.get_rng_state()
    check_settings(checkpoint, sample=True)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model_config(checkpoint).num_layers == 2


# Every setting with every kind of bad value

BAD: tuple[Any, ...] = (
    None, "x", "", "y" * 100_000, -1, 0, 1, 3.5, 1e308 * 10, float("nan"), [], [-1], {}, {"a": [{"b": None}]}, True,
    10**30, [10**30], [["x"]],
)  # fmt: skip
#: What is set right by the tensors, whatever config.json says: transformers would build another model.
REPAIRED = frozenset({
    "architectures", "decoder_sparse_step", "encoder_sparse_step", "is_encoder_decoder", "model_type",
    "num_decoder_layers", "num_experts", "num_layers", "num_sparse_decoder_layers", "num_sparse_encoder_layers",
    "router_bias",
})  # fmt: skip


#: Of a `use_cache` that is false but not `False`, half of transformers makes a cache and half does not: other tokens.
SENSELESS = frozenset(("use_cache", value) for value in ("''", "0", "[]", "{}"))
OUTCOMES = ("answered alike", "answered alone", "refused", "repaired")


def mutations(original: Path) -> Iterable[tuple[str, str, Any]]:
    config = json.loads((original / "config.json").read_text())
    for key in sorted({*config, "n_positions", "hidden_size", "torch_dtype"} - {"transformers_version"}):
        yield from (("config.json", key, value) for value in BAD)
    for key in sorted({*GenerationConfig().__dict__, "nobody_s"}):
        yield from ((place, key, value) for value in BAD for place in ("config.json", generation.FILE))


def check_mutation(folder: Path, place: str, key: str, value: Any, beams: int) -> str:
    """Return what came of it."""
    if place == "config.json":
        (folder / generation.FILE).unlink(missing_ok=True)
        with_config(folder, **{key: value})
    else:
        with_generation(folder, **{key: value})
    case = f"{place}: {key} = {str(value)[:60]!r}, {beams} beams"
    options = {"num_beams": beams} if beams > 1 else {}
    try:
        found = ours(folder, **options)
    except SwitchrunError as error:
        # Memory is reserved for `n_positions` tokens, and the budget has none to spare.
        codes = (4, 5, 7) if key == "n_positions" else (5, 7)
        clear = error.exit_code in codes and len(str(error)) < 5000
        return "refused" if clear else f"{case}: {error}"
    if key in REPAIRED:
        return "repaired"
    if (key, repr(value)) in SENSELESS:
        return "answered alone"
    try:
        expected = oracle.answers(folder, TEXTS, TOKENS, **options)
    except Exception:  # it has many ways to refuse
        return "answered alone"
    assert found == expected, case
    return "answered alike"


def run_mutations(original: Path, folder: Path, every: int, start: int = 0) -> dict[str, int]:
    counts: dict[str, int] = {}
    wrong = []
    for number, (place, key, value) in enumerate(list(mutations(original))[start::every]):
        copied = Path(shutil.copytree(original, folder / str(number), copy_function=os.link))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # transformers warns of values that it then works with
                outcome = check_mutation(copied, place, key, value, 1 if number % 4 else 2)
            assert outcome in OUTCOMES
        except Exception as error:  # all of them are wanted
            wrong.append(f"{place}: {key} = {str(value)[:60]!r}: {type(error).__name__}: {str(error)[:300]}")
        shutil.rmtree(copied)
        counts[outcome] = counts.get(outcome, 0) + 1
    assert not wrong, "\n".join(wrong)
    return counts


def test_some_mutations(original: Path, tmp_path: Path) -> None:
    counts = run_mutations(original, tmp_path, every=211)
    assert counts["answered alike"]
    assert counts["refused"]


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(8))
def test_every_mutation(original: Path, tmp_path: Path, part: int) -> None:
    run_mutations(original, tmp_path, every=8, start=part)
