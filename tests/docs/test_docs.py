"""The documents keep up with the code: links, variables, exit codes, constants, and every message a user can meet."""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from switchrun import errors
from switchrun.cli.app import app
from tests.conftest import ROOT, validate

DOCS = ROOT / "docs"
PACKAGE = ROOT / "switchrun"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    ROOT / "benchmarks" / "RESULTS.md",
    ROOT / "offload" / "README.md",
    ROOT / "switchrun" / "demo" / "MODEL_CARD.md",
    *sorted(DOCS.glob("*.md")),
]
ERRORS = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.SwitchrunError)]


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(read(path)) for path in sorted(PACKAGE.rglob("*.py"))}


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", read(page), flags=re.MULTILINE | re.DOTALL)


def section(page: Path, heading: str) -> str:
    """One section of a page, by the text of its heading of level two; line breaks are spaces."""
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", read(page), flags=re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} has no section {heading}"
    return " ".join(found[1].split())


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ +(.*)$", re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_every_page_is_in_the_index():
    index = read(DOCS / "README.md")
    assert not [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"]({page.name})" not in index]


def test_every_page_begins_with_what_it_is_for():
    for page in DOCS.glob("*.md"):
        heading, first = read(page).split("\n\n")[:2]
        assert re.fullmatch(r"# .+", heading), page.name
        assert (first[0] not in "#|!-" and not first.startswith("```")) or page.name == "README.md", (
            f"{page.name} begins with no sentence"
        )


def test_every_schema_is_explained():
    assert not [path.name for path in DOCS.glob("schemas/*") if f"(schemas/{path.name})" not in read(DOCS / "json.md")]


def test_environment_variables():
    in_code = {name for path in sources() for name in re.findall(r"SWITCHRUN_[A-Z_]*[A-Z]", read(path))}
    assert {name for name in in_code if name != "SWITCHRUN_"} == set(
        re.findall(r"SWITCHRUN_[A-Z_]*[A-Z]", read(DOCS / "environment.md"))
    )


def test_variables_of_libraries():
    name = r"\b(?:HF|TRANSFORMERS)_[A-Z_]*[A-Z]\b"
    in_code = {found for path in sources() for found in re.findall(name, read(path))}
    assert in_code <= set(re.findall(name, read(DOCS / "environment.md")))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_exit_codes_of_exceptions(error):
    row = re.search(rf"^\| (\d+) \| `{error.__name__}` \| `(\w+)` \|", read(DOCS / "exit-codes.md"), flags=re.M)
    assert row
    assert (int(row[1]), row[2]) == (error.exit_code, error.kind)


def test_all_exit_codes_are_listed():
    listed = set(map(int, re.findall(r"^\| (\d+) \|", read(DOCS / "exit-codes.md"), flags=re.M)))
    assert listed == {0, 3, 129, 130, 141, 143} | {error.exit_code for error in ERRORS}


def test_constants_of_the_memory_arithmetic():
    from switchrun.planning import budgets, memory

    page = DOCS / "offloading.md"
    reads = section(page, "Slots and reads")
    assert f"From {memory.DIRECT_IO_BYTES // 2**20} MiB an expert on" in reads
    promise = section(page, "The promise of `--cpu-memory`")
    assert f"`RUNTIME_BYTES`, {memory.RUNTIME_BYTES // 2**20} MiB" in promise
    assert f"{memory.FIRST_RUN_BYTES // 2**20} MiB (`FIRST_RUN_BYTES`)" in promise
    assert f"`KEPT_KERNELS_BYTES`, {memory.KEPT_KERNELS_BYTES // 2**20} MiB" in promise
    assert f"to {memory.KEPT_KERNELS} (`KEPT_KERNELS`)" in " ".join(promise.split())
    assert memory.MALLOC_SHARE == 0.25
    assert "a quarter more (`MALLOC_SHARE`)" in promise
    assert f"{memory.MALLOC_BYTES // 2**20} MiB at the most (`MALLOC_BYTES`)" in promise
    assert f"`INDEX_BYTES_PER_TENSOR`, {memory.INDEX_BYTES_PER_TENSOR} for" in promise
    assert f"`STAGING_BUFFERS`, {memory.STAGING_BUFFERS} buffers" in promise
    assert f"{memory.RESERVED_SLOTS} slots (`RESERVED_SLOTS`)" in promise
    gpus = section(page, "GPUs")
    assert f"`GPU_LIBRARY_BYTES`, {memory.GPU_LIBRARY_BYTES // 2**20} MiB" in gpus
    assert f"{memory.GPU_RESERVED_SLOTS} slots (`GPU_RESERVED_SLOTS`)" in gpus
    assert f"{budgets.GPU_RESERVE_BYTES // 2**20} MiB (`GPU_RESERVE_BYTES`)" in gpus
    assert f"{budgets.GPU_RESERVE_SHARE * 100:.0f} % (`GPU_RESERVE_SHARE`)" in gpus


def test_records_that_the_documents_show_are_valid():
    records = re.findall(r"^```json\n(.*?)^```", read(DOCS / "json.md"), flags=re.MULTILINE | re.DOTALL)
    assert len(records) == 2
    for record in records:
        validate(json.loads(record), "fill")


def test_options_that_the_documents_use_exist():
    known = {
        name: {flag for each in command.params for flag in each.opts + each.secondary_opts}
        for name, command in leaves(app_group())
    }
    shown = [(page, line) for page in PAGES for line in commands_shown(page)]
    assert len(shown) > 20
    for page, line in shown:
        lexer = shlex.shlex(line.rstrip("\\"), posix=True, punctuation_chars="|<>")
        lexer.whitespace_split = True
        words = list(itertools.takewhile(lambda word: word[0] not in "|<>", lexer))
        name = " ".join(words[: 2 if words[0] in ("config", "offload") else 1])
        used = {word.partition("=")[0] for word in words if word.startswith("-") and word != "-"}
        assert used <= known[name], f"{page.name}: {line}"


def commands_shown(page: Path) -> Iterator[str]:
    """What stands behind `switchrun` in the blocks of commands of a page; behind a `$` where output is shown too."""
    for language, block in re.findall(r"^```(sh|console)\n(.*?)^```", read(page), flags=re.M | re.S):
        yield from re.findall(r"^switchrun (.*)$" if language == "sh" else r"^\$ switchrun (.*)$", block, flags=re.M)


def app_group() -> Any:
    import typer.main

    return typer.main.get_command(app)


def leaves(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its words."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


# Messages: a message's template is its text with `…` for whatever is put into it.


def template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "…"


def messages() -> dict[str, str]:
    """The hint of every message of an error, or of `report`; empty where there is none."""
    makers = {error.__name__ for error in ERRORS} | {"report", *local_makers()}
    found: dict[str, str] = {}
    for tree in sources().values():
        named = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
        for call in calls:
            if call.func.id in makers and call.args:
                words = [named.get(each.id, each) if isinstance(each, ast.Name) else each for each in call.args]
                message, *hint = map(template, words)
                if re.search(r"[a-z]{2}", message):
                    found[message] = hint[0] if hint else ""
    return found


def local_makers() -> set[str]:
    """Classes outside of `errors` that derive from one of its kinds."""
    names = {error.__name__ for error in ERRORS}
    return {
        node.name
        for tree in sources().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id in names for base in node.bases)
    }


def test_the_messages_that_are_explained_are_those_of_the_code():
    explained = re.findall(r"^- `(.*?)`: (.*)$", read(DOCS / "troubleshooting.md"), flags=re.M)
    hints = messages()
    assert len(hints) > 80
    assert len(explained) > 10
    for text, meaning in explained:
        assert text in hints, f"docs/troubleshooting.md explains what no code says: {text}"
        assert not hints[text] or hints[text] not in meaning, f"the hint says that already: {text}"
