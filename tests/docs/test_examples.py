"""The commands of README and docs are run, and what the pages show of their outputs is what they print."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import doc_examples
import terminal_picture

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def runner() -> Iterator[doc_examples.Runner]:
    with doc_examples.Runner() as runner:
        yield runner


@pytest.mark.slow
@pytest.mark.parametrize("page", doc_examples.PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page(page, runner):
    examples = [each for each in doc_examples.examples(page.read_text(encoding="utf-8")) if doc_examples.runs(each)]
    outcomes = runner.page([each.command for each in examples])
    failed = [
        f"$ {example.command}\n{printed}\n(exit code {code})"
        for example, (code, printed) in zip(examples, outcomes, strict=True)
        if not doc_examples.holds(example, code, printed)
    ]
    assert not failed, "\n\n".join(failed)


def test_what_is_compared():
    assert doc_examples.same("a 1.5 MiB\n…\nz", "a   2 GiB\nb\nc\nz")
    assert doc_examples.same("-1.5 man", "-1.2345\tman")
    assert not doc_examples.same("A man walks in.", "A woman walks in.")
    assert not doc_examples.same("a", "a\nb")
    assert not doc_examples.same("16 slots", "32 slots")


def test_most_examples_are_run():
    examples = [each for page in doc_examples.PAGES for each in doc_examples.examples(page.read_text(encoding="utf-8"))]
    assert sum(map(doc_examples.runs, examples)) > 60
    assert sum(each.shown is not None for each in examples) > 8


@pytest.mark.slow
def test_the_records_of_json_md(runner):
    blocks = re.findall(r"^```json\n(.*?)^```", (DOCS / "json.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    shown = [json.loads(block) for block in blocks]
    texts = " ".join(f"'{record['input']}'" for record in shown)
    ((_, printed),) = runner.page([f"printf '%s\\n' {texts} | switchrun fill --format jsonl 2>/dev/null"])
    assert [comparable(record) for record in shown] == [comparable(json.loads(line)) for line in printed.splitlines()]


def comparable(value: Any, name: str = "") -> Any:
    """A record without its times and peaks; its keys in their order."""
    if isinstance(value, dict):
        return [(key, comparable(each, key)) for key, each in value.items()]
    if isinstance(value, list):
        return [comparable(each) for each in value]
    return "…" if isinstance(value, float) or name == "peak_rss_bytes" else value


@pytest.mark.slow
def test_quoted_labels_of_stats(runner):
    pages = (page.read_text(encoding="utf-8") for page in doc_examples.PAGES)
    labels = [label for page in pages for label in re.findall(r"`([a-z ]+)`\s+in\s+`--stats`", page)]
    assert labels
    ((_, printed),) = runner.page(['switchrun fill --stats "A <extra_id_0> walks into a bar."'])
    assert not [label for label in labels if not re.search(rf"^{label}  ", printed, flags=re.MULTILINE)]


@pytest.mark.slow
def test_the_picture():
    shown = terminal_picture.PICTURE.read_text(encoding="utf-8")
    assert terminal_picture.content(shown) == terminal_picture.content(terminal_picture.draw())


def test_the_picture_is_small_and_fetches_nothing():
    shown = terminal_picture.PICTURE.read_text(encoding="utf-8")
    assert len(shown) < 60_000
    assert "url(http" not in shown
    assert len(terminal_picture.content(shown)) > 10


def set_up_commands(text):
    """The lines that make an environment, install into it and run something."""
    python = '"${PYTHON:-python3}"'
    return re.findall(r"^python3 -m venv \.venv && .*$", text.replace(python, "python3"), flags=re.MULTILINE)


def test_both_commands_are_what_ci_runs():
    main_job, tests = set_up_commands(README)
    assert [main_job, tests] == set_up_commands((ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    assert "switchrun fill" in main_job
    assert "pytest" in tests


def test_switchrun_is_called_by_name_once_it_is_on_the_path():
    activated = README.index("source .venv/bin/activate")
    assert not re.search(r"^\$? ?switchrun (fill|plan)", README[:activated], flags=re.MULTILINE)
    assert README.index("PIP_EXTRA_INDEX_URL") < README.index("pip install")


def test_ci_ends_with_the_tests():
    last = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert "pytest" in last
