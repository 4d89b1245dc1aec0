"""The README says what the commands do: its transcript is live, and its two commands are the ones that CI runs."""

from __future__ import annotations

import re
import sys

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import readme_transcript

README = (ROOT / "README.md").read_text(encoding="utf-8")
TRANSCRIPT = readme_transcript.shown(README)


def test_there_is_a_transcript():
    assert len(TRANSCRIPT) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("command", TRANSCRIPT)
def test_transcript_is_what_the_command_prints(command):
    assert readme_transcript.run(command, {}) == TRANSCRIPT[command]


def set_up_commands(text):
    """The lines that make an environment, install into it and run something."""
    python = '"${PYTHON:-python3}"'
    return re.findall(r"^python3 -m venv \.venv && .*$", text.replace(python, "python3"), flags=re.MULTILINE)


def test_both_commands_are_what_ci_runs():
    main_job, tests = set_up_commands(README)
    assert [main_job, tests] == set_up_commands((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert "switchrun fill" in main_job
    assert "pytest" in tests


def test_ci_ends_with_the_tests():
    last = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert "pytest" in last
