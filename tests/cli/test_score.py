"""`score` with a fake session: lines, formats, blanks, lines that fail."""

from __future__ import annotations

import json

import pytest

from switchrun.planning.options import OpenOptions
from tests.cli.conftest import Invoke
from tests.conftest import validate

TABS = "A <extra_id_0> b <extra_id_1>\tman\tc d"
JSON = '{"text": "A <extra_id_0> b <extra_id_1>", "spans": ["man", "c d"], "more": 1}'
ANSWER = "-3.5000\tA man b c d\t-1.0000\t-1.0000\n"


@pytest.mark.parametrize("line", [TABS, JSON, f" {JSON} ", "A ___ b ___\tman\tc d"])
def test_one_filling(invoke: Invoke, line: str) -> None:
    outcome = invoke("score", line, "-q", "--blank", "___")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, ANSWER, "")
    assert outcome.sessions[0].closed


def test_an_empty_span(invoke: Invoke) -> None:
    assert invoke("score", "A <extra_id_0>\t", "-q").stdout == "-3.5000\tA \t-1.0000\n"


def test_tabs_in_a_span_keep_the_columns(invoke: Invoke) -> None:
    line = json.dumps({"text": "A\t<extra_id_0>", "spans": ["b\tc\nd\x1b"]})
    assert invoke("score", line, "-q").stdout == "-3.5000\tA b c d\\x1b\t-1.0000\n"


def test_a_stream_in_batches(invoke: Invoke) -> None:
    lines = f"{TABS}\nbad\n{JSON}\n{TABS}\n".encode()
    outcome = invoke("score", "--batch-size", "2", "-m", "M", "-q", input=lines)
    assert outcome.stdout == f"{ANSWER}\n{ANSWER}{ANSWER}"
    assert outcome.code == 3
    assert outcome.stderr.startswith("switchrun: line 2: the text has no sentinel")
    assert outcome.sessions[0].opening == OpenOptions(model="M", batch_size=2, device_map="auto")
    assert [len(batch) for batch in outcome.sessions[0].batches] == [2, 1]


def test_lines_that_are_there_are_scored_together(invoke: Invoke) -> None:
    outcome = invoke("score", "-q", input=f"{TABS}\n{JSON}\n{TABS}\n".encode())
    assert outcome.stdout == ANSWER * 3
    assert outcome.sessions[0].opening.batch_size == "auto"
    assert [len(batch) for batch in outcome.sessions[0].batches] == [3]
    assert invoke("score", TABS, "-q").sessions[0].opening.batch_size == 1


def test_records(invoke: Invoke) -> None:
    outcome = invoke("score", TABS, "A <extra_id_0>\t", "{", "A <extra_id_0>", "--format", "jsonl")
    records = [json.loads(line) for line in outcome.stdout.splitlines()]
    for record in records:
        validate(record, "score")
    assert [record["id"] for record in records] == [0, 1, 2, 3]
    assert [record["input"] for record in records[2:]] == ["{", "A <extra_id_0>"]
    assert json.loads(invoke("score", TABS, "--format", "json").stdout)["log_probability"] == -3.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "a line that begins with { is JSON, and this one is not valid: Expecting property name"),
        ("{}", 'the line has no "text", or it is no string'),
        ('{"text": 3, "spans": []}', 'the line has no "text", or it is no string'),
        ('{"text": "A <extra_id_0>"}', 'the line has no "spans", or they are no list of strings'),
        ('{"text": "A <extra_id_0>", "spans": "man"}', 'the line has no "spans", or they are no list of strings'),
        ('{"text": "A <extra_id_0>", "spans": [1]}', 'the line has no "spans", or they are no list of strings'),
        ('{"text": "A <extra_id_0>", "spans": []}', "the text has 1 sentinel, but 0 spans came with it"),
        ('{"a": ' + "[" * 20_000 + "]" * 20_000 + "}", "a line that begins with { is JSON, and this one is not valid"),
        ('{"a": 1' + "0" * 5000 + "}", "a line that begins with { is JSON, and this one is not valid"),
        ("A <extra_id_0>", "the text has 1 sentinel, but 0 spans came with it"),
        ("A <extra_id_0>\tb\tc", "the text has 1 sentinel, but 2 spans came with it"),
        ("A <extra_id_0>\t<extra_id_1>", "a span has a sentinel in it"),
        ("[1]", "the text has no sentinel"),
    ],
)
def test_lines_that_cannot_be_read(invoke: Invoke, line: str, message: str) -> None:
    outcome = invoke("score", line)
    assert (outcome.code, outcome.stdout, outcome.sessions) == (4, "", [])
    assert outcome.stderr.startswith(f"switchrun: {message}")
    assert outcome.stderr.count("\n") == 1


def test_more_values_than_a_line_may_have(invoke: Invoke) -> None:
    outcome = invoke("score", "-q", input=b'{"text":[' + b"[]," * 340_000 + b"[]]}\n" + TABS.encode())
    assert (outcome.code, outcome.stdout) == (3, f"\n{ANSWER}")


def test_a_blank_must_be_one(invoke: Invoke) -> None:
    assert invoke("score", TABS, "--blank", "").code == 2
