"""The config file: defaults of options, and aliases of models. Each command reads it anew; nothing writes it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from switchrun.errors import UsageError, printable
from switchrun.machine.files import read_regular
from switchrun.machine.folders import NOWHERE, in_home

#: The demo model's name, and its tokenizer's.
DEMO = "demo"
#: The options that it may set, and whether a number will do: those that have a variable.
KEYS: Mapping[str, bool] = {
    "model": False,
    "dtype": False,
    "cpu-memory": True,
    "gpu-memory": True,
    "offload-folder": False,
    "offload-limit": True,
    "device-map": False,
    "tokenizer": False,
    "hub": False,
    "network-bandwidth": True,
    "batch-size": True,
    "max-new-tokens": True,
    "num-beams": True,
    "format": False,
    "server": False,
    "token-file": False,
}
_ALIASES = "aliases"
_VARIABLE = "SWITCHRUN_CONFIG"
#: Without a slash: what has one is a folder or a Hub id.
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
#: The time that tomllib takes for a key of many parts grows with their square.
_MOST_BYTES = 16 * 1024
_KINDS = {bool: "true or false", int: "a number", float: "a decimal number", list: "a list", dict: "a table"}


@dataclass(frozen=True, slots=True)
class Config:
    """What the file says: values of options, as they would be typed, and aliases; nothing if there is no file."""

    path: Path
    found: bool = False
    values: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


def config_path() -> Path:
    """Return where the file is looked for: `SWITCHRUN_CONFIG`, else in the user's folder of configuration."""
    named = os.environ.get(_VARIABLE)
    if named:
        return in_home(named)
    for folder in (Path(os.environ.get("XDG_CONFIG_HOME", "")), in_home("~/.config")):
        if folder.is_absolute():  # by XDG's rules a relative one counts as unset
            return folder / "switchrun" / "config.toml"
    return NOWHERE / "config.toml"


def read_config() -> Config:
    """Read the file.

    Raises:
        UsageError: It cannot be read, is no TOML, or says what it cannot say; the message names the file and the key.
    """
    path = config_path()
    if str(path) == os.devnull:
        return Config(path)
    if not os.path.lexists(path):  # nor may it be there where nobody may look, such as another user's home
        if os.environ.get(_VARIABLE):
            raise UsageError(f"{_VARIABLE}: there is no file '{path}'", "make it, or unset the variable")
        return Config(path)
    try:
        content = read_regular(path, _MOST_BYTES)
    except OSError as error:
        hint = f"correct it, or do without: {_VARIABLE}={os.devnull}"
        raise UsageError(f"{path}: cannot be read: {error.strerror}", hint) from error
    return _check(path, _parse(path, content))


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    import tomllib  # only if there is a file

    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not valid TOML: {error}", 'a line is like: cpu-memory = "6GiB"') from error
    except RecursionError as error:
        raise UsageError(f"{path}: not valid TOML: it is nested too deeply") from error


def _check(path: Path, record: Mapping[str, Any]) -> Config:
    values: dict[str, str] = {}
    for key, value in record.items():
        if key == _ALIASES:
            continue
        if key not in KEYS:
            raise UsageError(f"{path}: {_quoted(key)} is not a key", _nearest(key, (*KEYS, _ALIASES)))
        text = _text(path, key, value, number=KEYS[key])
        values[key] = str(in_home(text)) if text.startswith("~") else text
    return Config(path, True, values, _check_aliases(path, record.get(_ALIASES, {})))


def _check_aliases(path: Path, table: Any) -> dict[str, str]:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {_ALIASES}: a table is expected, not {_kind(table)}", f"begin it with [{_ALIASES}]")
    aliases: dict[str, str] = {}
    for name, value in table.items():
        place = f"{_ALIASES}: {printable(name, 60)}"
        if name == DEMO or not _ALIAS.fullmatch(name):
            hint = "it is the demo model's" if name == DEMO else "use letters, digits, '.', '_' and '-'"
            raise UsageError(f"{path}: {_ALIASES}: {_quoted(name)} cannot be an alias", hint)
        text = _text(path, place, value)
        if not text:
            raise UsageError(f"{path}: {place}: the name is empty", "write a folder or a Hub id")
        if text in table:
            raise UsageError(f"{path}: {place}: {_quoted(text)} is an alias itself", "write what that stands for")
        aliases[name] = str(in_home(text)) if text.startswith("~") else text
    return aliases


def _text(path: Path, place: str, value: Any, *, number: bool = False) -> str:
    """Return a value as it would be typed."""
    if not isinstance(value, str) and not (number and type(value) is int):
        wanted = "a number or a text in quotes" if number else "a text in quotes"
        raise UsageError(f"{path}: {place}: {wanted} is expected, not {_kind(value)}")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise UsageError(f"{path}: {place}: the number is too large")
    text = str(value)
    if printable(text, len(text)) != text:
        raise UsageError(f"{path}: {place}: {_quoted(text)} has control characters")
    return text


def _kind(value: Any) -> str:
    return next((name for kind, name in _KINDS.items() if type(value) is kind), "a date or a time")


def _quoted(text: str) -> str:
    return f"'{printable(text, 60)}'"


def _nearest(key: str, known: Iterable[str]) -> str:
    near = get_close_matches(key[:60], list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


def resolve_alias(name: str) -> str:
    """Return what an alias stands for, and any other name as it is; errors are those of `read_config`.

    An alias wins over a folder of its name, which is `./name`; a Hub id has a slash, so none can be an alias.
    """
    if name == DEMO or not _ALIAS.fullmatch(name):
        return name
    return read_config().aliases.get(name, name)


class Defaults:
    """The file in the place of options' own defaults, for one run of the command line.

    A file that cannot be used is no reason to fail before a value of it is needed: help and `config` need none.
    """

    def __init__(self) -> None:
        """Read nothing yet."""
        self._path = config_path()
        self._used: dict[str, str] = {}

    def of(self, command: Any) -> dict[str, Any]:
        """Return typer's `default_map` for a group of commands: of each, the options that have a variable."""
        try:
            config = read_config()
            names, error = config.values.keys(), None
        except UsageError as caught:
            config, names, error = Config(self._path), KEYS.keys(), caught

        def later(key: str) -> Any:
            def value() -> str:
                if error is not None:
                    raise error
                self._used[key] = config.values[key]
                return config.values[key]

            return value

        values = {key: later(key) for key in names}
        return _by_command(command, values) if values else {}

    def explain(self, message: str) -> str:
        """Return a message of an error that names the file, if it is about a value of it."""
        key = message.partition(": ")[0].removeprefix("--")
        if message.startswith("--") and key in self._used:
            return f"{printable(self._path)}: {message.removeprefix('--')}"
        named = [key for key in self._used if re.search(rf"--{key}(?![a-z-])", message)]
        named += [key for key, value in self._used.items() if f"'{value}'" in message]
        if not named:
            return message
        return f"{message}; {printable(self._path)} sets {' and '.join(dict.fromkeys(named))}"


def _by_command(command: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by the names that a command's parameters have in Python, in a group by its commands."""
    if hasattr(command, "commands"):
        return {name: _by_command(each, values) for name, each in command.commands.items()}
    keys = {each.name: config_key(each) for each in command.params}
    return {name: values[key] for name, key in keys.items() if key is not None and key in values}


def config_key(parameter: Any) -> str | None:
    """Return the key of a parameter: its long name, if it has a variable."""
    return max(parameter.opts, key=len).removeprefix("--") if parameter.envvar else None
