"""`generate` with a fake session: what it has apart from `fill`, whose options, formats and streams it shares."""

from __future__ import annotations

import json

import pytest

from switchrun.model.records import GenerationOptions
from tests.cli.conftest import Invoke
from tests.conftest import validate

NOTE = "m answers in sentinels, so it looks pre-trained only"


def test_texts_without_sentinels(invoke: Invoke) -> None:
    outcome = invoke("generate", "-q", "one", "two <extra_id_0>", "", "--batch-size", "2")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, "one\ntwo \n\n", "")
    assert outcome.sessions[0].batches == [["one", "two <extra_id_0>"], [""]]
    assert invoke("generate", "-q", "one", "--format", "raw").stdout == "<pad> one</s>\n"


def test_a_prefix(invoke: Invoke) -> None:
    assert invoke("generate", "one", "--prefix", "summarize: ").sessions[0].batches == [["summarize: one"]]


def test_records_and_failures(invoke: Invoke) -> None:
    lines = b"one\n\xff\nTOO LONG\nfour\n"
    outcome = invoke("generate", "-q", "--format", "jsonl", input=lines)
    assert outcome.code == 3
    records = [json.loads(line) for line in outcome.stdout.splitlines()]
    for record in records:
        validate(record, "generate")
    assert [(record["id"], "error" in record) for record in records] == [(0, False), (1, True), (2, True), (3, False)]
    assert [message.split(":")[1] for message in outcome.stderr.splitlines()] == [" line 2", " line 3"]
    assert invoke("generate", "-q", input=lines).stdout == "one\n\n\nfour\n"


def test_a_model_that_looks_pre_trained_is_noted_once(invoke: Invoke) -> None:
    lines = b"1 <extra_id_0>\n2 <extra_id_0>\n"
    assert invoke("generate", "-m", "m", input=lines).stderr.count(f"switchrun: note: {NOTE}") == 1
    assert invoke("generate", "-m", "m", "-q", input=lines).stderr == ""
    assert NOTE not in invoke("generate", "-m", "m", "one").stderr
    assert NOTE not in invoke("generate", "-m", "m", "--batch-size", "2", "one", "2 <extra_id_0>").stderr
    assert NOTE not in invoke("fill", "-m", "m", "1 <extra_id_0>").stderr


def test_what_is_not_given_is_the_model_s(invoke: Invoke) -> None:
    session = invoke("generate", "one").sessions[0]
    assert (session.opening.num_beams, session.opening.max_new_tokens) == (None, None)
    assert session.options == [GenerationOptions(num_beams=4)]


def test_options_reach_the_session(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHRUN_NUM_BEAMS", "2")
    sampling = ["--sample", "--temperature", "0.5", "--top-p", "0.9", "--top-k", "7", "--seed", "3"]
    session = invoke("generate", "one", "--max-new-tokens", "9", *sampling).sessions[0]
    assert (session.opening.num_beams, session.opening.max_new_tokens) == (2, 9)
    assert session.options == [GenerationOptions(9, 2, True, 0.5, 0.9, 7, 3)]
    assert invoke("generate", "one", "--explain").sessions[0].options == [GenerationOptions(num_beams=2, explain=True)]
    assert invoke("generate", "one", "--no-sample").sessions[0].options == [GenerationOptions(num_beams=2)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seed", "3"], "--seed does nothing without --sample"),
        (["--no-sample", "--top-k", "3"], "--top-k does nothing without --sample"),
        (["--sample", "--temperature", "0"], "--temperature must be above 0"),
        (["--num-beams", "0"], "--num-beams: '0' is not a whole number of at least 1"),
        (["--max-new-tokens", "9" * 400], "--max-new-tokens: 9999"),
        (["--blank", "___"], "--blank"),
        (["--prefix", "a \udcff"], "--prefix: not UTF-8: byte 0xff at offset 2"),
    ],
)
def test_usage_errors_are_one_line(invoke: Invoke, args: list[str], message: str) -> None:
    outcome = invoke("generate", "one", *args)
    assert (outcome.code, outcome.stdout, outcome.sessions) == (2, "", [])
    assert message in outcome.stderr
    assert outcome.stderr.count("\n") == 1


def test_fill_sends_plain_texts_here(invoke: Invoke) -> None:
    message = invoke("fill", "no sentinel").stderr
    assert "--blank ___" in message
    assert "switchrun generate" in message
