"""docs/python-api.md names every argument, field and member of the public API."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable

import pytest

import switchrun
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", switchrun.__all__)
def test_every_public_name(name):
    assert f"`{name}`" in PAGE or f"## `{name}" in PAGE


def section(start: str) -> str:
    """The section whose heading begins so."""
    found = re.search(rf"^## `{re.escape(start)}.*?\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert found, start
    return found[1]


def arguments(function: Callable[..., object]) -> set[str]:
    return set(inspect.signature(function).parameters)


def test_every_argument_of_plan():
    assert not [name for name in arguments(switchrun.plan) if f"`{name}`" not in section("plan(")]


def test_every_argument_of_open():
    # Its section refers to that of `plan` for what both take, and names what only `plan` takes.
    of_plan, of_open = arguments(switchrun.plan), arguments(switchrun.Session.open)
    page = section("Session.open(")
    assert not [name for name in of_open ^ of_plan if f"`{name}`" not in page]
    assert "It takes the arguments of `plan`" in page


@pytest.mark.parametrize(
    "kind", [switchrun.GenerationOptions, switchrun.FillResult, switchrun.Filling, switchrun.ScoreResult]
)
def test_every_field(kind):
    page = section(kind.__name__)
    assert not [field.name for field in dataclasses.fields(kind) if f"`{field.name}`" not in page]


def test_every_member_of_a_session():
    session = switchrun.Session
    members = {name for name, value in vars(session).items() if inspect.isfunction(value) and not name.startswith("_")}
    assert not [name for name in members if f"- `session.{name}" not in section("Session.open(")]
