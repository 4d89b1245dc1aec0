"""`Session.generate`: the answers of transformers' own `generate` with a checkpoint's own settings, to the token."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from switchrun import GenerateResult, GenerationOptions, Session
from switchrun.checkpoint import generation
from switchrun.errors import BudgetError, InputError, ModelError, UsageError
from switchrun.planning.opening import plan_model
from switchrun.planning.options import OpenOptions
from switchrun.planning.plan import Plan
from tests.conftest import validate
from tests.model.test_settings import BESIDE, EFFECTIVE, with_config, with_generation
from tests.support import oracle
from tests.support.checkpoints import save_tiny_tokenizer
from tests.support.sessions import small_process
from tests.support.strategies import CheckpointSpec

__all__ = ["small_process"]
pytestmark = pytest.mark.usefixtures("small_process")

TEXTS = ("the man sat on the mat .", "a man walks into a <extra_id_0>", "")
SAMPLING = {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9}
#: Every other setting that is kept; what `EFFECTIVE` has not shows with beams, with sampling, or not at all.
VALUES: dict[str, dict[str, Any]] = {
    name: {name: value} | BESIDE.get(name, {}) for name, value in EFFECTIVE.items()
} | {
    "bos_token_id": {"bos_token_id": 5, "decoder_start_token_id": None},
    "decoder_start_token_id": {"decoder_start_token_id": 7},
    "early_stopping": {"early_stopping": True, "eos_token_id": list(range(60, 128))},
    "epsilon_cutoff": SAMPLING | {"epsilon_cutoff": 0.02},
    "eta_cutoff": SAMPLING | {"eta_cutoff": 0.02},
    "length_penalty": {"length_penalty": -4.0, "eos_token_id": list(range(60, 128))},
    "max_time": {"max_time": 1000.0},
    "min_p": SAMPLING | {"min_p": 0.5},
    "remove_invalid_values": {"remove_invalid_values": True},
    "renormalize_logits": {"renormalize_logits": True},
    "top_h": SAMPLING | {"top_h": 0.5},
    "typical_p": SAMPLING | {"typical_p": 0.5},
}


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("fp32", tmp_path_factory.mktemp("fp32"))


@pytest.fixture
def copy(fp32: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp32, tmp_path / "model", copy_function=os.link))


def saved(dtype: str, folder: Path) -> Path:
    spec = CheckpointSpec(dtype=dtype, seed=2)
    return save_tiny_tokenizer(spec.save(spec.model(), folder))


def opened(folder: Path, **options: Any) -> Session:
    return Session.open(folder, **{"num_beams": None, "max_new_tokens": None} | options)


def ours(folder: Path, texts: Sequence[str] = TEXTS, **changes: Any) -> list[list[int]]:
    """Answer each text by itself, with the same seed, as the oracle does."""
    reserved = {name: changes[name] for name in ("num_beams", "max_new_tokens") if name in changes}
    with opened(folder, **reserved) as session:
        options = session.own_options(**changes) if changes else None
        return [list(session.generate([text], options)[0].output_ids) for text in texts]


# Every setting, from the file


def test_every_setting_that_is_kept_is_tested() -> None:
    assert set(VALUES) == generation.KEPT


@pytest.mark.slow
@pytest.mark.parametrize("name", VALUES)
def test_a_setting_with_the_file_s_length_and_beams(copy: Path, name: str) -> None:
    folder = with_generation(copy, **{"max_length": 9, "num_beams": 3} | VALUES[name])
    assert ours(folder) == oracle.own_answers(folder, TEXTS, seed=0)


WAYS: list[dict[str, Any]] = [
    {"max_length": 4, "max_new_tokens": 6},
    {"max_length": 12, "min_length": 8, "num_beams": 2, "length_penalty": 2.0, "no_repeat_ngram_size": 2},
    {"max_new_tokens": 7} | SAMPLING,
    {"max_new_tokens": 7, "do_sample": True, "temperature": 3.0},
    {"max_new_tokens": 7, "do_sample": True, "temperature": 3.0, "top_k": 0},
    {"max_new_tokens": 7, "num_beams": 3} | SAMPLING,
    {"max_new_tokens": 7, "num_beams": None, "do_sample": None, "temperature": 0.0, "top_p": None},
    {"max_new_tokens": 7, "num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True},
]


@pytest.mark.parametrize("settings", WAYS)
def test_the_file_s_own_way_to_generate(copy: Path, settings: dict[str, Any]) -> None:
    check_way(with_generation(copy, **settings), settings)


@pytest.mark.parametrize("settings", WAYS[1:6:2])
def test_the_way_of_config_json(copy: Path, settings: dict[str, Any]) -> None:
    (copy / generation.FILE).unlink(missing_ok=True)
    check_way(with_config(copy, **settings), settings)


@pytest.mark.parametrize("settings", WAYS[1:6:2])
def test_the_way_in_bf16(tmp_path: Path, settings: dict[str, Any]) -> None:
    check_way(with_generation(saved("bf16", tmp_path), **settings), settings)


def check_way(folder: Path, settings: dict[str, Any]) -> None:
    expected = oracle.own_answers(folder, TEXTS, seed=0)
    assert ours(folder) == expected
    assert max(map(len, expected)) <= 1 + (settings.get("max_new_tokens") or settings["max_length"] - 1)


def test_64_tokens_where_the_file_sets_no_length(copy: Path) -> None:
    folder = with_generation(copy, eos_token_id=None)
    found = ours(folder)
    assert {len(ids) for ids in found} == {65}
    assert found == oracle.own_answers(folder, TEXTS, max_new_tokens=64)


def test_settings_of_tasks_are_ignored(copy: Path) -> None:
    (copy / generation.FILE).unlink(missing_ok=True)
    folder = with_config(copy, max_length=6, task_specific_params={"summarization": {"num_beams": 4, "prefix": "x"}})
    assert ours(folder) == oracle.own_answers(folder, TEXTS)


def test_what_is_given_counts_before_the_file(copy: Path) -> None:
    folder = with_generation(copy, max_length=9, num_beams=3, **SAMPLING)
    for changes, asked in (
        ({"sample": False, "num_beams": 2}, {"do_sample": False, "num_beams": 2}),
        ({"max_new_tokens": 3, "top_k": 0}, {"max_new_tokens": 3, "top_k": 0}),
    ):
        assert ours(folder, **changes) == oracle.own_answers(folder, TEXTS, seed=0, **asked)


def test_without_sampling_in_the_file_it_is_transformers_sampling(copy: Path) -> None:
    with opened(with_generation(copy)) as session:
        assert session.own_options(sample=True, seed=5) == GenerationOptions(64, 1, True, 1.0, 1.0, 50, 5)
        assert session.own_options() == GenerationOptions()


def test_a_whole_number_as_temperature(copy: Path) -> None:
    folder = with_generation(copy, max_new_tokens=7, do_sample=True, temperature=3)
    assert ours(folder) == oracle.own_answers(folder, TEXTS, seed=0, temperature=3.0)


def test_fill_does_not_look(copy: Path) -> None:
    folder = with_generation(copy, max_length="x", num_beams=10**9, do_sample=7, top_k=-3)
    with Session.open(folder) as session:
        assert session.fill([TEXTS[1]], GenerationOptions(max_new_tokens=2))
        assert session.generate([TEXTS[0]], GenerationOptions(max_new_tokens=2))


# Batches, records, arguments


def test_a_batch_gives_the_answers_of_each_text(copy: Path) -> None:
    folder = with_generation(copy, max_length=9, num_beams=3)
    with opened(folder, batch_size=2) as session:
        results = session.generate(TEXTS, ids=range(5, 5 + len(TEXTS)))
    assert [list(result.output_ids) for result in results] == oracle.own_answers(folder, TEXTS)
    assert [(result.id, result.input) for result in results] == list(enumerate(TEXTS, start=5))


def test_a_record(fp32: Path) -> None:
    with Session.open(fp32) as session:
        (result,) = session.generate([TEXTS[0]], GenerationOptions(max_new_tokens=4), prefix="the red ")
        decoded = session._tokenizer.decode(result.output_ids)
    assert type(result) is GenerateResult
    assert (result.input, result.text) == (TEXTS[0], decoded.strip())
    assert result.raw.startswith("<pad>")
    record = json.loads(json.dumps(result.as_record()))
    validate(record, "generate")
    assert list(record)[:6] == ["schema_version", "id", "input", "text", "raw", "output_ids"]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"sample": True}])
def test_an_explanation(fp32: Path, options: dict[str, Any]) -> None:
    asked = GenerationOptions(max_new_tokens=6, **options)
    with opened(fp32, batch_size=2, num_beams=2) as session:
        plain = session.generate(TEXTS, asked)
        results = session.generate(TEXTS, replace(asked, explain=True))
        with pytest.raises(UsageError, match=r"^alternatives: only fill has them"):
            session.generate(TEXTS, GenerationOptions(alternatives=1))
    assert [result.output_ids for result in results] == [result.output_ids for result in plain]
    for result in results:
        assert result.routing is not None
        assert len(result.routing.output_tokens) == result.tokens.output
        assert {layer.stack for layer in result.routing.layers} == {"encoder", "decoder"}
        validate(json.loads(json.dumps(result.as_record())), "generate")


def test_a_prefix_is_read_before_each_text(fp32: Path) -> None:
    expected = oracle.answers(fp32, [f"the red cat {text}" for text in TEXTS], 6)
    with Session.open(fp32, batch_size=3) as session:
        results = session.generate(TEXTS, GenerationOptions(max_new_tokens=6), prefix="the red cat ")
        encoded = [session.encode_text(text, "the red cat ") for text in TEXTS]
        again = session.generate(encoded, GenerationOptions(max_new_tokens=6), prefix="not put before these ")
    assert [list(result.output_ids) for result in results] == expected
    assert [result.output_ids for result in again] == [result.output_ids for result in results]
    assert [result.tokens.input for result in again] == [len(each.ids) for each in encoded]


def test_arguments_that_are_no_texts(fp32: Path) -> None:
    with Session.open(fp32) as session:
        assert session.generate("a text", GenerationOptions(max_new_tokens=2)).id == 0
        with pytest.raises(UsageError, match="is no str"):
            session.fill([session.encode_text("no sentinel")])  # type: ignore[list-item]
        with pytest.raises(UsageError, match="no GenerationOptions"):
            session.generate(["a"], 3)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="top_k"):
            session.own_options(top_k=-1)
        with pytest.raises(InputError, match="the tokenizer does not take the text"):
            session.generate(["a"], prefix="\udcff")
        assert session.generate([session.encode(TEXTS[1])], GenerationOptions(max_new_tokens=2))[0].input == TEXTS[1]


# Memory, and what makes no sense


def test_memory_is_reserved_for_the_file_s_own(copy: Path) -> None:
    folder = with_generation(copy, max_length=700, num_beams=6)
    with opened(folder) as session:
        assert (session.plan.num_beams, session.plan.estimate.output_tokens) == (6, 699)
    with Session.open(folder) as session, pytest.raises(BudgetError) as caught:
        session.generate(TEXTS)
    assert str(caught.value) == ("6 beams are asked for, memory is reserved for 1 (open the session with num_beams=6)")
    with Session.open(folder, num_beams=6) as session, pytest.raises(BudgetError, match="max_new_tokens=699"):
        session.generate(TEXTS)


SILLY: list[tuple[str, Any]] = [
    (name, value)
    for name in ("max_length", "max_new_tokens", "num_beams")
    for value in (-1, 0, True, "x", 1e3, [3], {}, 10**30)
] + [("max_length", 1)]  # fmt: skip


def planned(folder: Path, **options: Any) -> Plan:
    options = {"num_beams": None, "max_new_tokens": None} | options
    with closing(plan_model(OpenOptions(folder, gpu_memory=0, **options))) as made:
        return made.plan


@pytest.mark.parametrize(("name", "value"), SILLY)
def test_a_silly_length_is_one_clear_line(copy: Path, name: str, value: Any) -> None:
    folder = with_generation(copy, **{name: value})
    flag = "--num-beams" if name == "num_beams" else "--max-new-tokens"
    with pytest.raises(ModelError, match=rf"{generation.FILE}: {name}: .*\(use {flag}\)"):
        planned(folder)
    assert planned(folder, num_beams=2, max_new_tokens=5).num_beams == 2


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"max_length": 10**9}, "--max-new-tokens"),
        ({"num_beams": 10**9}, "--num-beams"),
        ({"max_new_tokens": 10**9, "num_beams": 10**9}, "--num-beams or --max-new-tokens"),
    ],
)
def test_a_length_for_which_there_is_no_memory(copy: Path, settings: dict[str, int], flags: str) -> None:
    folder = with_generation(copy, **settings)
    with pytest.raises(BudgetError, match=rf"{generation.FILE} asks for .* or use a smaller {flags}\)$"):
        planned(folder)
    with pytest.raises(BudgetError) as caught:  # nothing of the file's is to blame
        planned(folder, cpu_memory="1MiB", num_beams=1, max_new_tokens=5)
    assert "asks for" not in str(caught.value)


def test_a_silly_way_to_draw_is_one_clear_line(fp32: Path) -> None:
    silly: list[tuple[str, Any]] = [
        ("do_sample", 1),
        ("do_sample", "yes"),
        ("temperature", 0.0),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("temperature", 10**400),
        ("top_p", -1),
        ("top_p", [1]),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", 10**30),
    ]
    with Session.open(fp32) as session:
        checkpoint = session.checkpoint
        for name, value in silly:
            session.checkpoint = replace(checkpoint, generation={"do_sample": True} | {name: value})
            with pytest.raises(ModelError, match=rf"config\.json: {name}.*--no-sample\)"):
                session.generate(TEXTS)
            given = {} if name == "do_sample" else {name: 1}
            assert session.own_options(sample=True, **given).sample
            assert not session.own_options(sample=False).sample
