"""The config file: defaults, aliases, and what is said of a file that cannot be used."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from switchrun.checkpoint.locate import demo_folder
from switchrun.cli.app import app
from switchrun.cli.config_file import KEYS, Defaults, config_key
from tests.cli.conftest import Invoke, Outcome
from tests.conftest import validate

TEXT = "A <extra_id_0>."
ALIASES = '[aliases]\nc2048 = "google/switch-c-2048"\nmine = "~/mine"\nshipped = "demo"\n'


@pytest.fixture
def config(hermetic: dict[str, str]) -> Path:
    """Where the file is looked for; nothing is there yet."""
    path = Path(hermetic["HOME"]) / ".config" / "switchrun" / "config.toml"
    path.parent.mkdir(parents=True)
    return path


def refused(done: Outcome, *words: str) -> None:
    """Hold a refusal against what all have in common."""
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("switchrun: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_the_file_sets_defaults(invoke: Invoke, config: Path, hermetic: dict[str, str]) -> None:
    config.write_text(
        'model = "org/m"\ndtype = "nf4"\ncpu-memory = 2147483648\noffload-folder = "~/kept"\n'
        'hub = "ranges"\nmax-new-tokens = 7\ntokenizer = "~/t"\nbatch-size = "2"\n'
    )
    session = invoke("fill", TEXT).sessions[0]
    opening = session.opening
    assert (opening.model, opening.dtype, opening.cpu_bytes) == ("org/m", "nf4", 2 << 30)
    assert opening.folder == Path(hermetic["HOME"]) / "kept"
    assert opening.tokenizer == str(Path(hermetic["HOME"]) / "t")
    assert (opening.hub, opening.max_new_tokens, opening.batch_size) == ("ranges", 7, 2)
    assert session.options[0].max_new_tokens == 7


def test_options_win_over_variables_and_those_over_the_file(
    invoke: Invoke, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text('model = "org/file"\ndtype = "nf4"\nhub = "ranges"\n')
    monkeypatch.setenv("SWITCHRUN_MODEL", "org/variable")
    monkeypatch.setenv("SWITCHRUN_DTYPE", "int8")
    monkeypatch.setenv("SWITCHRUN_HUB", "")
    opening = invoke("fill", "--model", "org/option", TEXT).sessions[0].opening
    assert (opening.model, opening.dtype, opening.hub) == ("org/option", "int8", "ranges")


def test_what_a_command_has_no_option_for_is_no_matter(invoke: Invoke, config: Path) -> None:
    config.write_text('format = "jsonl"\ntokenizer = "/nowhere"\nmax-new-tokens = "many"\n')
    done = invoke("offload", "ls")
    assert (done.code, done.stderr) == (0, "")
    assert invoke("plan").stdout.startswith("Model\n"), "its --format has no variable"


@pytest.mark.parametrize("place", ["XDG_CONFIG_HOME", "SWITCHRUN_CONFIG"])
def test_where_it_is(invoke: Invoke, config: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('dtype = "int8"\n')
    other = tmp_path / "switchrun" / "config.toml"
    other.parent.mkdir()
    other.write_text('dtype = "nf4"\n')
    assert invoke("config", "path").stdout == f"{config}\n"
    monkeypatch.setenv(place, str(tmp_path if place.startswith("XDG") else other))
    assert invoke("config", "path").stdout == f"{other}\n"
    assert invoke("fill", TEXT).sessions[0].opening.dtype == "nf4"
    monkeypatch.setenv(place, "relative" if place.startswith("XDG") else "")
    assert invoke("fill", TEXT).sessions[0].opening.dtype == "int8"


def test_without_a_file(invoke: Invoke, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke("config", "path")
    assert (done.code, done.stdout) == (0, f"{config}\n")
    assert done.stderr == "switchrun: there is no such file yet; every option has its own default\n"
    config.write_text('dtype = "int8"\n')
    monkeypatch.setenv("SWITCHRUN_CONFIG", os.devnull)
    assert invoke("fill", TEXT).sessions[0].opening.dtype == "auto"
    monkeypatch.setenv("SWITCHRUN_CONFIG", "/no/such/file")
    refused(invoke("fill", TEXT), "SWITCHRUN_CONFIG: there is no file '/no/such/file'")


def test_a_home_that_nobody_may_look_into_has_no_file(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file"))
    assert invoke("fill", TEXT).code == 0
    monkeypatch.setattr(os.path, "lexists", lambda _: False)  # as where the folder may not be searched
    assert invoke("fill", TEXT).code == 0
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError))
    assert invoke("fill", TEXT).code == 0


BAD = {
    "cpu_memory = 1": "'cpu_memory' is not a key (did you mean cpu-memory?)",
    "q = 1": "'q' is not a key",
    "[fill]\nmodel = 'x'": "'fill' is not a key",
    "model = 3": "model: a text in quotes is expected, not a number",
    "model = true": "model: a text in quotes is expected, not true or false",
    "cpu-memory = 1.5": "cpu-memory: a number or a text in quotes is expected, not a decimal number",
    "cpu-memory = 1979-05-27": "cpu-memory: a number or a text in quotes is expected, not a date or a time",
    "hub = ['auto']": "hub: a text in quotes is expected, not a list",
    "max-new-tokens = 0x" + "f" * 6000: "max-new-tokens: the number is too large",
    "max-new-tokens = " + "9" * 6000: "not valid TOML",
    'model = "a\\u001b[31mb"': "model: 'a\\x1b[31mb' has control characters",
    'model = "a\\nb"': "model: 'a b' has control characters",
    '"a\\u001b[31mb" = 1': "'a\\x1b[31mb' is not a key",
    "aliases = 3": "aliases: a table is expected, not a number",
    "[aliases]\na = 3": "aliases: a: a text in quotes is expected, not a number",
    "[aliases]\na.b = 'x'": "aliases: a: a text in quotes is expected, not a table",
    "[aliases]\n'a/b' = 'x'": "aliases: 'a/b' cannot be an alias",
    "[aliases]\n'\\u202e' = 'x'": "cannot be an alias",
    "[aliases]\ndemo = 'x'": "aliases: 'demo' cannot be an alias (it is the demo model's)",
    "[aliases]\na = ''": "aliases: a: the name is empty",
    "[aliases]\na = 'x/y'\nb = 'a'": "aliases: b: 'a' is an alias itself",
    "[aliases]\na = 'a'": "aliases: a: 'a' is an alias itself",
    "model": "not valid TOML",
    "model = 'a'\nmodel = 'b'": "not valid TOML",
    "x = " + "[" * 16_000: "not valid TOML: it is nested too deeply",
    "a." * 2_000 + "a = 1": "'a' is not a key",
    "#" * 20_000: "cannot be read: it has 20000 bytes, a file of its kind 16384 at most",
}


@pytest.mark.parametrize("text", BAD, ids=lambda text: text[:20])
def test_a_file_that_cannot_be_used(invoke: Invoke, config: Path, text: str) -> None:
    config.write_text(text)
    done = invoke("fill", TEXT)
    refused(done, BAD[text])
    assert done.stderr.startswith(f"switchrun: {config}: ")
    assert len(done.stderr) < 500
    assert "\x1b" not in done.stderr
    assert "\u202e" not in done.stderr


def test_bytes_that_are_no_text(invoke: Invoke, config: Path) -> None:
    config.write_bytes(b'model = "\xff"')
    refused(invoke("fill", TEXT), f"{config}: not UTF-8: byte 0xff at offset 9")
    config.write_bytes(b'\xef\xbb\xbfdtype = "nf4"\r\n')
    assert invoke("fill", TEXT).sessions[0].opening.dtype == "nf4"


@pytest.mark.parametrize("kind", ["fifo", "folder", "large", "loop"])
def test_what_is_no_config_file(invoke: Invoke, config: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(config)
    elif kind == "folder":
        config.mkdir()
    elif kind == "loop":
        config.symlink_to(config)
    else:
        with config.open("wb") as file:
            file.truncate(1 << 30)
    refused(invoke("fill", TEXT), f"{config}: cannot be read: ", "or do without: SWITCHRUN_CONFIG=/dev/null")


@pytest.mark.parametrize("args", [["--help"], ["fill", "--help"], ["--version"], ["config"], ["config", "path"]])
def test_a_broken_file_does_not_stop_help(invoke: Invoke, config: Path, args: list[str]) -> None:
    config.write_text("nonsense")
    done = invoke(*args)
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout


def test_help_is_the_same_whatever_the_file_says(invoke: Invoke, config: Path) -> None:
    plain = invoke("fill", "--help").stdout
    config.write_text('dtype = "nf4"\nhub = "ranges"\n')
    assert invoke("fill", "--help").stdout == plain


BAD_VALUES = {
    "dtype = 'int4'": "dtype: 'int4' is not one of 'auto', 'fp32', 'bf16', 'int8', 'nf4' (see: switchrun fill --help)",
    "cpu-memory = 'much'": "cpu-memory: 'much' is not a size",
    "max-new-tokens = 0": "max-new-tokens: '0' is not a whole number of at least 1",
    "batch-size = 0": "batch-size: '0' is neither auto nor a whole number above 0",
    "model = ''": "model: the name is empty",
    "network-bandwidth = 'fast'": "network-bandwidth: 'fast' is not a rate",
    "device-map = 'nowhere'": "device-map: there is no file 'nowhere'",
}


@pytest.mark.parametrize("text", BAD_VALUES)
def test_a_value_is_refused_as_the_option_would_be(invoke: Invoke, config: Path, text: str) -> None:
    config.write_text(text)
    done = invoke("fill", TEXT)
    refused(done, f"switchrun: {config}: {BAD_VALUES[text]}")
    key = text.partition(" = ")[0]
    assert "--" + key not in done.stderr.partition("(")[0]
    given = {"dtype": "nf4", "max-new-tokens": "3", "batch-size": "1", "model": "org/m", "device-map": "auto"}
    assert invoke("fill", f"--{key}", given.get(key, "1GB/s" if key.startswith("net") else "1GiB"), TEXT).code == 0


def test_an_error_about_a_value_of_the_file_says_so(invoke: Invoke, config: Path) -> None:
    config.write_text('model = "nowhere"\ncpu-memory = "1MiB"\n')
    done = invoke("plan")
    assert done.code == 5
    assert done.stderr.startswith("switchrun: there is no folder 'nowhere', and it is not a Hub id (")
    assert done.stderr.endswith(f"; {config} sets model\n")
    done = invoke("plan", "--model", "demo")
    assert done.code == 6
    assert done.stderr.endswith(f"; {config} sets cpu-memory\n")
    done = invoke("plan", "--model", "demo", "--cpu-memory", "1MiB")
    assert "sets" not in done.stderr


def test_a_flag_that_only_begins_like_a_key_is_another(config: Path) -> None:
    config.write_text('model = "x"\nhub = "auto"\n')
    defaults = Defaults()
    found = defaults.of(typer.main.get_command(app))["fill"]
    found["model"]()
    assert defaults.explain("--model-parallel does nothing, nor --hub") == "--model-parallel does nothing, nor --hub"


# Aliases.


def parsers(group: Any, words: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from parsers(command, f"{words}{name} ")
            continue
        for each in command.params:
            if each.name in ("model", "reference_model"):
                yield f"{words}{name} {each.opts[0]}", each.type_descriptor.parameter_info.parser


def test_every_command_that_takes_a_model_takes_an_alias(config: Path, hermetic: dict[str, str]) -> None:
    config.write_text(ALIASES)
    found = dict(parsers(typer.main.get_command(app)))
    assert {"fill --model", "eval --reference-model", "offload clear --model", "doctor --model"} <= found.keys()
    for name, parse in found.items():
        assert parse("c2048") == "google/switch-c-2048", name
        assert parse("mine") == str(Path(hermetic["HOME"]) / "mine"), name
        assert parse("./c2048") == "./c2048", name
        assert parse("c2048/") == "c2048/", name
        assert parse("google/switch-base-8") == "google/switch-base-8", name
        assert parse("other") == "other", name


def test_an_alias_from_anywhere(invoke: Invoke, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c2048").mkdir()
    config.write_text('model = "c2048"\n' + ALIASES)
    assert invoke("fill", TEXT).sessions[0].opening.model == "google/switch-c-2048"
    monkeypatch.setenv("SWITCHRUN_MODEL", "c2048")
    assert invoke("fill", TEXT).sessions[0].opening.model == "google/switch-c-2048"
    assert invoke("fill", "-m", "./c2048", TEXT).sessions[0].opening.model == "./c2048"


def test_an_alias_that_is_none(invoke: Invoke, config: Path) -> None:
    config.write_text(ALIASES)
    done = invoke("plan", "--model", "c2049")
    assert done.code == 5
    assert "there is no folder 'c2049'" in done.stderr


def test_the_demo_has_a_name(invoke: Invoke, config: Path) -> None:
    config.write_text('model = "org/m"\n' + ALIASES)
    Path("demo").mkdir()
    for name in ("demo", "shipped"):
        opening = invoke("fill", "--model", name, "--tokenizer", "demo", TEXT).sessions[0].opening
        assert (opening.model, opening.tokenizer) == (None, str(demo_folder()))
    opening = invoke("fill", "--model", "./demo", "--tokenizer", "./demo", TEXT).sessions[0].opening
    assert (opening.model, opening.tokenizer) == ("./demo", "./demo")


def test_a_synthetic_model_is_measured_instead_of_the_file_s(invoke: Invoke, config: Path) -> None:
    config.write_text('model = "org/m"\n')
    assert "--model and --synthetic" not in invoke("bench", "--synthetic", "none").stderr
    assert "--model and --synthetic" in invoke("bench", "--synthetic", "none", "-m", "org/m").stderr


# What holds.


def test_the_keys_are_the_options_that_have_variables() -> None:
    def walk(group: Any) -> Iterator[str | None]:
        for command in group.commands.values():
            yield from walk(command) if hasattr(command, "commands") else map(config_key, command.params)

    assert set(walk(typer.main.get_command(app))) - {None} == set(KEYS)


def test_show(invoke: Invoke, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text('model = "c2048"\ncpu-memory = "6GiB"\n' + ALIASES)
    monkeypatch.setenv("SWITCHRUN_CPU_MEMORY", "\x1b[31m")
    record = json.loads(invoke("config", "show", "--format", "json").stdout)
    validate(record, "config")
    assert (record["path"], record["found"], record["problem"]) == (str(config), True, None)
    found = {each["key"]: (each["value"], each["source"]) for each in record["settings"]}
    assert found.keys() == KEYS.keys()
    assert found["model"] == ("c2048", "file")
    assert found["cpu-memory"] == ("\x1b[31m", "environment")
    assert found["dtype"] == (None, "default")
    defaults = {each["key"]: each["default"] for each in record["settings"]}
    assert (defaults["model"], defaults["dtype"], defaults["max-new-tokens"]) == ("the demo model", "auto", "64")
    assert record["aliases"]["c2048"] == "google/switch-c-2048"
    done = invoke("config", "show")
    assert (done.code, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{config}\n")
    assert "\x1b" not in done.stdout
    for words in (["model", "c2048", "file"], ["cpu-memory", "\\x1b[31m", "SWITCHRUN_CPU_MEMORY"]):
        assert words in [line.split() for line in done.stdout.splitlines()]


def test_show_of_a_broken_file(invoke: Invoke, config: Path) -> None:
    config.write_text("nonsense")
    done = invoke("config", "show", "--format", "json")
    assert done.code == 0
    assert done.stderr.startswith(f"switchrun: warning: {config}: not valid TOML: ")
    record = json.loads(done.stdout)
    validate(record, "config")
    assert not record["found"]
    assert record["problem"].startswith(f"{config}: not valid TOML")
