"""The documents keep up with the code: links, variables, exit codes, constants, and every message a user can meet."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from switchrun import errors
from switchrun.cli.app import app
from tests.conftest import ROOT, validate

DOCS = ROOT / "docs"
PACKAGE = ROOT / "switchrun"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "offload" / "README.md", *sorted(DOCS.glob("*.md"))]
ERRORS = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.SwitchrunError)]


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def sources() -> dict[Path, ast.Module]:
    return {path: ast.parse(read(path)) for path in sorted(PACKAGE.rglob("*.py"))}


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]*`", "", read(page), flags=re.MULTILINE | re.DOTALL)


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


def test_environment_variables():
    in_code = {name for path in sources() for name in re.findall(r"SWITCHRUN_[A-Z_]*[A-Z]", read(path))}
    assert {name for name in in_code if name != "SWITCHRUN_"} == set(
        re.findall(r"SWITCHRUN_[A-Z_]*[A-Z]", read(DOCS / "environment.md"))
    )


def test_variables_of_libraries():
    page = read(DOCS / "environment.md")
    in_code = {name for path in sources() for name in re.findall(r"\b(?:HF|TRANSFORMERS)_[A-Z_]*[A-Z]\b", read(path))}
    assert not [name for name in in_code if name not in page]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_exit_codes_of_exceptions(error):
    row = re.search(rf"^\| `{error.__name__}`[^|]*\| (\d+) \| `(\w+)` \|$", read(DOCS / "exit-codes.md"), flags=re.M)
    assert row
    assert (int(row[1]), row[2]) == (error.exit_code, error.kind)


def test_all_exit_codes_are_listed():
    listed = set(map(int, re.findall(r"^\| (\d+) \|", read(DOCS / "exit-codes.md"), flags=re.M)))
    assert listed == {0, 3, 130, 141, 143} | {error.exit_code for error in ERRORS}


def test_constants_of_the_memory_arithmetic():
    from switchrun.planning import budgets, memory

    page = read(DOCS / "offloading.md")
    assert f"`RUNTIME_BYTES`, {memory.RUNTIME_BYTES // 2**20} MiB" in page
    assert f"{memory.FIRST_RUN_BYTES // 2**20} MiB (`FIRST_RUN_BYTES`)" in page
    assert f"`INDEX_BYTES_PER_TENSOR`, {memory.INDEX_BYTES_PER_TENSOR} for" in page
    assert f"`STAGING_BUFFERS`, {memory.STAGING_BUFFERS} buffers" in page
    assert f"{memory.RESERVED_SLOTS} slots (`RESERVED_SLOTS`)" in page
    assert f"`GPU_LIBRARY_BYTES`, {memory.GPU_LIBRARY_BYTES // 2**20} MiB" in page
    assert f"{memory.GPU_RESERVED_SLOTS} slots (`GPU_RESERVED_SLOTS`)" in page
    assert f"{budgets.GPU_RESERVE_BYTES // 2**20} MiB (`GPU_RESERVE_BYTES`)" in page
    assert f"{budgets.GPU_RESERVE_SHARE * 100:.0f} %\n(`GPU_RESERVE_SHARE`)" in page
    assert f"From {memory.DIRECT_IO_BYTES // 2**20} MiB an expert on" in page


def test_records_that_the_documents_show_are_valid():
    records = re.findall(r"^```json\n(.*?)^```", read(DOCS / "json.md"), flags=re.MULTILINE | re.DOTALL)
    assert len(records) == 2
    for record in records:
        validate(json.loads(record), "fill")


def test_options_that_the_documents_use_exist():
    import typer.main

    known = {"--help", "--version"}
    for command in typer.main.get_command(app).commands.values():
        known |= {name for parameter in command.params for name in parameter.opts}
    for page in PAGES:
        for line in re.findall(r"^(?:\$ )?switchrun (?:fill|plan|eval) .*$", read(page), flags=re.M):
            words = shlex.split(line.partition("|")[0], comments=True)
            used = {word.partition("=")[0] for word in words if word.startswith("--")}
            assert used <= known, f"{page.name}: {line}"


# Messages: a message's template is its text with `…` for whatever is put into it.


def template(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return "…"


def messages() -> Iterator[tuple[str, str]]:
    """Every message of an error, or of `report`, with the place where it is made."""
    makers = {error.__name__ for error in ERRORS} | {"report", *local_makers()}
    for path, tree in sources().items():
        named = {
            target.id: node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in makers):
                continue
            if node.args:
                first = node.args[0]
                first = named.get(first.id, first) if isinstance(first, ast.Name) else first
                yield f"{path.relative_to(ROOT)}:{node.lineno}", template(first)


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


def test_every_message_is_explained():
    explained = set(re.findall(r"^\| `(.*?)` \|", read(DOCS / "troubleshooting.md"), flags=re.M))
    found = {text: place for place, text in messages() if re.search(r"[a-z]{2}", text)}
    assert len(found) > 80
    missing = [f"{place}: {text}" for text, place in found.items() if text not in explained]
    assert not missing, "docs/troubleshooting.md lacks:\n" + "\n".join(missing)
    assert not explained - set(found), "docs/troubleshooting.md explains what no code says"
