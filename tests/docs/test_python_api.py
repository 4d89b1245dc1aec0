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


def signature(function: Callable[..., object]) -> str:
    """The arguments as they are written, with their defaults, but without their types."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    bare = inspect.Signature([each.replace(annotation=inspect.Parameter.empty) for each in parameters])
    return str(bare)[1:-1].replace("'", '"')


def defaults(function: Callable[..., object], page: str) -> list[str]:
    """The arguments whose defaults the page does not give: `name` (`default`), or for several names in their order."""
    found: dict[str, str] = {}
    for names, values in re.findall(r"^- ((?:`\w+`(?:, )?)+) \((.*?)\): ", page, re.MULTILINE):
        found |= zip(re.findall(r"\w+", names), (value.strip(" `") for value in values.split(",")), strict=True)
    parameters = inspect.signature(function).parameters.values()
    own = {each.name: str(each.default).replace("'", '"') for each in parameters if each.name in found}
    return [name for name, value in own.items() if found[name].strip('"') != value]


def test_every_argument_of_plan():
    assert defaults(switchrun.plan, section("plan(")) == []
    assert not [name for name in arguments(switchrun.plan) if f"`{name}`" not in section("plan(")]


def test_every_argument_of_open():
    # Its section refers to that of `plan` for what both take, and names what only `plan` takes.
    of_plan, of_open = arguments(switchrun.plan), arguments(switchrun.Session.open)
    page = section("Session.open(")
    assert defaults(switchrun.Session.open, section("plan(")) == defaults(switchrun.Session.open, page) == []
    assert defaults(switchrun.GenerationOptions, section("GenerationOptions")) == []
    assert not [name for name in of_open ^ of_plan if f"`{name}`" not in page]
    assert "It takes the arguments of `plan`" in page


@pytest.mark.parametrize(
    "kind",
    [
        switchrun.GenerationOptions,
        switchrun.FillResult,
        switchrun.Filling,
        switchrun.Progress,
        switchrun.ScoreResult,
    ],
)
def test_every_field(kind):
    page = section(kind.__name__)
    assert not [field.name for field in dataclasses.fields(kind) if f"`{field.name}`" not in page]


@pytest.mark.parametrize(("kind", "heading"), [(switchrun.Session, "Session.open("), (switchrun.Client, "Client(")])
def test_every_member(kind, heading):
    members = {name: value for name, value in vars(kind).items() if inspect.isfunction(value) and name[0] != "_"}
    page, variable = section(heading), kind.__name__.lower()
    written = {name: re.search(rf"`{variable}\.{name}\((.*?)\)`[:,]", page) for name in members}
    assert not [name for name, found in written.items() if found is None]
    assert {name: found[1] for name, found in written.items() if found} == {
        name: signature(member) for name, member in members.items()
    }


def test_every_argument_of_a_client():
    page = section("Client(")
    assert f"## `Client({signature(switchrun.Client.__init__)})`" in PAGE
    assert defaults(switchrun.Client, page) == []
    assert not [name for name in arguments(switchrun.Client) if f"- `{name}`" not in page]
