"""`switchrun config`: where the config file is, and what holds now."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import typer

from switchrun.cli import options
from switchrun.cli.commands import Command, Group
from switchrun.cli.config_file import KEYS, Config, config_key, config_path, read_config
from switchrun.cli.help import default
from switchrun.cli.streams import report, write_answer
from switchrun.errors import UsageError, printable
from switchrun.output.sinks import format_record

SCHEMA_VERSION = 1

app = typer.Typer(cls=Group, rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def config(context: typer.Context) -> None:
    """Show the config file's place, and the defaults that hold now.

    Examples:
        switchrun config path
        switchrun config show
        switchrun config show --format json
    """
    if context.invoked_subcommand is None:
        write_answer(f"{context.get_help()}\n")


@app.command("path", cls=Command)
def show_path() -> None:
    """Print the path of the config file.

    Examples:
        switchrun config path
        switchrun config path | xargs cat
    """
    path = config_path()
    if not os.path.lexists(path):
        report("there is no such file yet; every option has its own default")
    write_answer(f"{printable(path)}\n")


@app.command("show", cls=Command)
def show(context: typer.Context, style: options.Format = options.TableFormat.TABLE) -> None:
    """Show what holds now: each default, and where it is from.

    Examples:
        switchrun config show
        switchrun config show --format json | jq .settings
    """
    problem = ""
    try:
        found = read_config()
    except UsageError as error:
        found, problem = Config(config_path()), str(error)
        report(f"warning: {problem}")
    record = {
        "schema_version": SCHEMA_VERSION,
        "path": str(found.path),
        "found": found.found,
        "problem": problem or None,
        "settings": list(_settings(context.find_root().command, found)),
        "aliases": dict(found.aliases),
    }
    if style is options.TableFormat.JSON:
        write_answer(format_record(record, indent=True))
    else:
        from switchrun.output.tables import render_config

        write_answer(render_config(record))


def _settings(group: Any, found: Config) -> Iterator[dict[str, Any]]:
    known = {config_key(each): each for command in reversed(group.commands.values()) for each in command.params}
    for key in KEYS:
        option = known[key]
        value, source = found.values.get(key), "file"
        if os.environ.get(option.envvar):
            value, source = os.environ[option.envvar], "environment"
        yield {
            "key": key,
            "value": value,
            "source": "default" if value is None else source,
            "default": default(option),
            "variable": option.envvar,
        }
