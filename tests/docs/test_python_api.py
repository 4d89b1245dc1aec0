"""docs/python-api.md names every argument, field and member of the public API."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import switchrun
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", switchrun.__all__)
def test_every_public_name(name):
    assert f"`{name}`" in PAGE or f"## `{name}" in PAGE


@pytest.mark.parametrize("function", [switchrun.plan, switchrun.Session.open], ids=["plan", "Session.open"])
def test_every_argument(function):
    missing = [name for name in inspect.signature(function).parameters if f"`{name}`" not in PAGE]
    assert not missing


@pytest.mark.parametrize("kind", [switchrun.GenerationOptions, switchrun.FillResult])
def test_every_field(kind):
    missing = [field.name for field in dataclasses.fields(kind) if f"`{field.name}`" not in PAGE]
    assert not missing


def test_every_member_of_a_session():
    session = switchrun.Session
    members = {name for name, value in vars(session).items() if inspect.isfunction(value) and not name.startswith("_")}
    missing = [name for name in members if f"`session.{name}" not in PAGE]
    assert not missing
