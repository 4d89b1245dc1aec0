"""Answers on a terminal: what was filled in has a colour, and nobody else's codes are obeyed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from switchrun.model.records import Span
from switchrun.model.sentinels import Filling
from switchrun.output.sinks import FillFormat, format_result
from switchrun.planning.options import OpenOptions
from tests.cli.fakes import FakeSession

BEGIN, END = "\x1b[1;32m", "\x1b[0m"


@pytest.fixture
def session() -> FakeSession:
    return FakeSession(OpenOptions(), None, lambda _warning: None, lambda _plan: None)


def test_spans_have_a_colour(session: FakeSession) -> None:
    result = session._answer("A <extra_id_0> b\x1b[2J\n<extra_id_1>, <extra_id_2>", 0)
    spans = (Span("<extra_id_0>", "\x1b[31mred\nline\x1b[0m"), Span("<extra_id_1>", None), Span("<extra_id_2>", ""))
    result = replace(result, text="A \x1b[31mred\nline\x1b[0m b\x1b[2J\n<extra_id_1>, ", spans=spans)
    plain = r"A \x1b[31mred line\x1b[0m b\x1b[2J <extra_id_1>, "
    assert format_result(result, FillFormat.TEXT) == f"{plain}\n"
    coloured = plain.replace(r"\x1b[31mred line\x1b[0m", rf"{BEGIN}\x1b[31mred line\x1b[0m{END}")
    assert format_result(result, FillFormat.TEXT, colours=True) == f"{coloured}\n"
    for style in (FillFormat.RAW, FillFormat.JSON, FillFormat.JSONL):
        assert "\x1b" not in format_result(result, style, colours=True)


def test_so_have_those_of_scores(session: FakeSession) -> None:
    (score,) = session.score([session.encode_filling(Filling("A <extra_id_0> b", ["m\tn"]))], ids=[0])
    assert format_result(score, FillFormat.TEXT) == "-3.5000\tA m n b\t-1.0000\n"
    assert format_result(score, FillFormat.TEXT, colours=True) == f"-3.5000\tA {BEGIN}m n{END} b\t-1.0000\n"
