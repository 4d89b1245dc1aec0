"""What is written about the command line agrees with the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from jsonschema import Draft202012Validator, ValidationError

from switchrun.cli.app import app
from tests.conftest import ROOT, validate

sys.path.insert(0, str(ROOT / "tools"))
import cli_reference


def test_the_generated_pages_are_fresh(hermetic: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "tools" / "cli_reference.py"), "--check"]
    done = subprocess.run(command, env=hermetic, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["cli.md", "environment.md"])
def test_a_stale_page_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_reference, "DOCS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli_reference.py"])
    assert cli_reference.main() == 0
    page = tmp_path / name
    page.write_text(page.read_text(encoding="utf-8").replace("--cpu-memory", "--memory"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["cli_reference.py", "--check"])
    assert cli_reference.main() == 1
    assert capsys.readouterr().err == f"docs/{name} is stale; run: python tools/cli_reference.py\n"


def test_each_variable_has_the_commands_that_take_it() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(SWITCHRUN_\w+)` \| `(--[a-z-]+)` \| ([a-z, ]+) \|", page, flags=re.MULTILINE)
    shown = {(variable, option, command) for variable, option, names in rows for command in names.split(", ")}

    def taken(group: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from taken(command, f"{prefix}{name} ")
            for parameter in command.params:
                if parameter.envvar:
                    yield parameter.envvar, parameter.opts[0], f"{prefix}{name}"

    assert shown == set(taken(typer.main.get_command(app)))


@pytest.mark.parametrize("name", ["config", "doctor", "eval", "fill", "generate", "models", "offload", "plan", "score"])
def test_schemas_describe_every_key(name: str) -> None:
    schema = json.loads((ROOT / "docs" / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)

    def walk(node: object) -> None:
        if isinstance(node, dict):
            if node.get("type") == "object":
                assert "additionalProperties" in node
            for key, value in node.get("properties", {}).items():
                assert value.get("description"), key
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(schema)


def test_a_record_is_a_result_or_a_failure() -> None:
    failure = {"schema_version": 1, "id": 0, "input": "", "error": {"kind": "input", "message": "m", "hint": ""}}
    validate(failure, "fill")
    with pytest.raises(ValidationError):
        validate({**failure, "text": "both"}, "fill")
