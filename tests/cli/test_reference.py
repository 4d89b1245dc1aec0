"""What is written about the command line agrees with the command line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from jsonschema import Draft202012Validator, ValidationError

from tests.conftest import ROOT, validate


def test_the_reference_is_fresh(hermetic: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "tools" / "cli_reference.py"), "--check"]
    done = subprocess.run(command, env=hermetic, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["doctor", "eval", "fill", "offload", "plan"])
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
