"""What `--help` shows, and what a wrong command line is answered."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shlex
import subprocess
import sys
import termios
from collections.abc import Iterator
from typing import Any

import pytest
import typer.main

import switchrun
from switchrun.cli.app import app
from switchrun.cli.help import Panel, is_argument, long_name, split_examples
from tests.cli.conftest import Invoke

GROUP: Any = typer.main.get_command(app)


def walk(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A group and all that is in it, each with the words that follow `switchrun`."""
    yield words, group
    for name, command in getattr(group, "commands", {}).items():
        yield from walk(command, (*words, name))


COMMANDS = dict(walk(GROUP))
EXAMPLES = [(words, line) for words, command in COMMANDS.items() for line in split_examples(command.help)[1]]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_is_whole(invoke: Invoke, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = invoke(*words, "--help")
    assert (done.code, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= width
    assert not [line for line in lines if line.endswith(("...", " ")) or "\x1b" in line]
    # What a library says of types and ranges; a sentinel is our own.
    assert re.findall(r"<(?!extra_id_\d)\S[^>]*>|list\[|[<>]=|range\b(?!s)|env var", done.stdout) == []
    command = COMMANDS[words]
    for parameter in command.params:
        name = parameter.metavar if is_argument(parameter) else long_name(parameter)
        assert re.search(rf"^  (-\w, )?{re.escape(name)}\b", done.stdout, flags=re.MULTILINE), name
    examples = split_examples(command.help)[1]
    assert len(examples) >= (2 if len(words) > 1 else 3)
    assert lines[-len(examples) - 1 :] == ["Examples:", *(f"  {line}" for line in examples)]


def test_the_first_page(invoke: Invoke) -> None:
    done = invoke("--help")
    titles = [line[:-1] for line in done.stdout.splitlines() if re.fullmatch(r"\S+:", line)]
    assert titles == ["Answer", "Prepare", "Measure", "Options", "Examples"]
    for name, command in GROUP.commands.items():
        summary = command.help.splitlines()[0].rstrip(".")
        assert re.search(rf"^  {name} +{re.escape(summary)}$", done.stdout, flags=re.MULTILINE), name


@pytest.mark.parametrize("words", [(), ("offload",), ("config",)], ids=["switchrun", "offload", "config"])
def test_a_group_alone_shows_its_help(invoke: Invoke, words: tuple[str, ...]) -> None:
    assert invoke(*words) == invoke(*words, "--help")


def test_short_names(invoke: Invoke) -> None:
    assert invoke("-v").stdout == invoke("--version").stdout == f"switchrun {switchrun.__version__}\n"
    assert invoke("offload", "ls", "-h") == invoke("offload", "ls", "--help")


def test_panels_are_the_same_everywhere(invoke: Invoke) -> None:
    shown = re.findall(r"^(\w.*ptions):$", invoke("fill", "--help").stdout, flags=re.MULTILINE)
    assert shown == [panel for panel in Panel if panel in shown]
    assert len(shown) == 7
    places: dict[tuple[str, str], set[str | None]] = {}
    for command in COMMANDS.values():
        for parameter in command.params:
            if not is_argument(parameter):
                places.setdefault((long_name(parameter), parameter.help), set()).add(parameter.rich_help_panel)
    assert [name for name, panels in places.items() if len(panels) > 1] == []


def test_what_most_people_need_comes_first(invoke: Invoke) -> None:
    first = invoke("fill", "--help").stdout.partition("\nOptions:\n")[2].partition("\n\n")[0]
    names = re.findall(r"^  (?:-\w, )?(--[\w-]+)", first, flags=re.MULTILINE)
    assert names == ["--model", "--dtype", "--cpu-memory", "--max-new-tokens", "--format", "--help"]


def test_variables_of_options_are_named(invoke: Invoke) -> None:
    text = " ".join(invoke("prepare", "--help").stdout.split())
    assert "SWITCHRUN_MODEL sets the default of --model. Variables like it set those of --hub, --cpu-memory," in text
    assert "SWITCHRUN_OFFLOAD_FOLDER sets the default of --offload-folder." in invoke("offload", "ls", "-h").stdout


@pytest.mark.parametrize(("words", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_examples_are_true(words: tuple[str, ...], line: str) -> None:
    commands = [shlex.split(part) for part in re.split(r" [|] ", line)]
    given = next(command[1:] for command in commands if command[0] == "switchrun")
    given = given[: next((place for place, word in enumerate(given) if word in "<>"), None)]
    command, name = GROUP, "switchrun"
    while hasattr(command, "commands"):
        name = given.pop(0)
        command = command.commands[name]
    if not hasattr(COMMANDS[words], "commands"):
        assert command is COMMANDS[words]
    assert command.make_context(name, given).command is command  # what it does not take is a UsageError


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            "fill --batch-sise 3",
            "there is no option --batch-sise; did you mean --batch-size? (see: switchrun fill --help)",
        ),
        ("fill -z", "there is no option -z (see: switchrun fill --help)"),
        ("--model x fill", "--model is an option of a command: write switchrun fill --model (see: switchrun --help)"),
        ("fil", "there is no command 'fil'; did you mean fill? (see: switchrun --help)"),
        ("offload lst", "there is no command 'lst'; did you mean ls? (see: switchrun offload --help)"),
        ("fly", "there is no command 'fly' (see: switchrun --help)"),
        ("fill --model", "--model needs a value: -m, --model PATH|ID[@REVISION] (see: switchrun fill --help)"),
        (
            "fill --tokenizer --stats x",
            "--tokenizer needs a value, and --stats is an option: --tokenizer PATH|ID (see: switchrun fill --help)",
        ),
        ("fill --stats=3 x", "--stats takes no value (see: switchrun fill --help)"),
        ("map", "IN is missing (see: switchrun map --help)"),
        ("map in.txt", "-o, --output OUT is missing (see: switchrun map --help)"),
        ("prepare", "--dtype int8|nf4 is missing (see: switchrun prepare --help)"),
        ("doctor demo", "unexpected argument 'demo' (see: switchrun doctor --help)"),
        (
            "fill --max-new-tokens 0 x",
            "--max-new-tokens: '0' is not a whole number of at least 1 (see: switchrun fill --help)",
        ),
        ("eval --text x --seed few", "--seed: 'few' is not a whole number of at least 0 (see: switchrun eval --help)"),
        (
            "fill --sample --seed 9223372036854775808 x",
            "--seed: '9223372036854775808' is more than 9223372036854775807 (see: switchrun fill --help)",
        ),
        ("fill --temperature warm x", "--temperature: 'warm' is not a number (see: switchrun fill --help)"),
        (
            "score --format xml x",
            "--format: 'xml' is not one of 'text', 'json', 'jsonl' (see: switchrun score --help)",
        ),
    ],
)
def test_a_wrong_command_line(invoke: Invoke, args: str, message: str) -> None:
    done = invoke(*args.split())
    assert (done.code, done.stdout, done.stderr) == (2, "", f"switchrun: {message}\n")


def test_a_wrong_value_of_a_variable(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHRUN_NUM_BEAMS", "\x1b[31mmany")
    message = "SWITCHRUN_NUM_BEAMS: '\\x1b[31mmany' is not a whole number of at least 1 (see: switchrun fill --help)"
    assert invoke("fill", "x").stderr == f"switchrun: {message}\n"


def test_completion(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_SWITCHRUN_COMPLETE", "complete_fish")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    for typed, found in {"p": {"plan", "prepare"}, "fill --num": {"--num-beams"}, "offload v": {"verify"}}.items():
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", f"switchrun {typed}")
        with pytest.raises(SystemExit) as end:
            app([], prog_name="switchrun")
        assert not end.value.code
        lines = capsys.readouterr().out.splitlines()
        assert {line.split("\t")[0] for line in lines} == found


def test_help_on_a_terminal(hermetic: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    env = {name: value for name, value in hermetic.items() if name != "COLUMNS"} | {"FORCE_COLOR": "1"}
    process = subprocess.Popen([sys.executable, "-m", "switchrun", "fill", "-h"], env=env, stdout=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # all of it was read
        while chunk := os.read(ours, 65536):
            shown += chunk
    os.close(ours)
    assert process.wait() == 0
    lines = shown.decode().splitlines()
    assert 90 < max(map(len, lines)) <= 100
    assert "\x1b" not in shown.decode()
