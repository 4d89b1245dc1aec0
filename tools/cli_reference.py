"""Write docs/cli.md and docs/environment.md from the live command line, or check that they are fresh.

python tools/cli_reference.py            writes both files
python tools/cli_reference.py --check    exits with 1 if one of them is stale
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer.main
from typer import Context

from switchrun.cli import help as command_help
from switchrun.cli.app import app

DOCS = Path(__file__).resolve().parent.parent / "docs"

_SHARED = "Options of several commands"

_CLI_HEAD = """# Command line

Written by `tools/cli_reference.py` from the program itself; do not edit.

Answers go to stdout, everything else to stderr. Defaults are in brackets. Options that are only named are
explained [at the end](#options-of-several-commands). `switchrun` alone lists the commands, and
`switchrun COMMAND -h` explains one. See also the [exit codes](exit-codes.md), and the
[environment variables](environment.md) that stand for options.
"""

_ENVIRONMENT_HEAD = """# Environment variables

Written by `tools/cli_reference.py` from the program itself; do not edit.

## Instead of options

An option on the command line wins over its variable, and that over the [config file](configuration.md). The
[Python API](python-api.md) reads none of these.
"""

# What is read without an option: by switchrun itself, or by a library that it uses.
_OTHER_VARIABLES = {
    "Without an option": {
        "SWITCHRUN_CONFIG": "the [config file](configuration.md), instead of `switchrun/config.toml` in "
        "`$XDG_CONFIG_HOME` or `~/.config`. `/dev/null` does without one.",
        "SWITCHRUN_CACHE": "the folder for what switchrun remembers, instead of `switchrun` in the user's cache. "
        "Without a home folder nothing is kept.",
        "SWITCHRUN_TOKEN": "the token that `fill`, `generate` and `score` send to a server, without `--token-file`.",
        "SWITCHRUN_DEBUG": "`1` shows the traceback of an error, and the messages of the libraries.",
    },
    "The Hub": {
        "HF_HOME": "where downloads are kept, by default `~/.cache/huggingface`. For `--hub download`, a large disk.",
        "HF_HUB_CACHE": "the same, for downloaded models alone.",
        "HF_TOKEN": "your token, for gated and private models.",
        "HF_HUB_OFFLINE": "`1` uses only what is on this machine.",
        "HF_ENDPOINT": "the address of a mirror, instead of https://huggingface.co.",
        "HTTPS_PROXY": "a proxy for the Hub.",
    },
    "The terminal": {
        "NO_COLOR": "no colours in tables, nor where a sentinel was filled in.",
        "COLUMNS": "the width of tables, of help and of the progress line; by default the terminal's. In pipes help is "
        "80 wide, and a line of a table as long as it must be.",
        "TERM": "`dumb` means no progress line and no colours.",
        "FORCE_COLOR": "ignored, since it would put cursor codes into files.",
    },
    "Processors": {
        "SWITCHRUN_KERNELS": "the path of switchrun's own kernels: `avx512`, `avx2` or `portable`; by default the best "
        "that the processor has. `off` multiplies by torch alone: slowly.",
        "OMP_NUM_THREADS": "how many threads torch computes with; by default one a core.",
        "CUDA_VISIBLE_DEVICES": "the GPUs to use, as for any program.",
    },
}

_ENVIRONMENT_TAIL = """`huggingface_hub` reads its variables itself;
[its documentation](https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables) lists them all.
Unless `SWITCHRUN_DEBUG` is set, the command line sets these where they are unset, to keep stderr its own:
`HF_HUB_DISABLE_PROGRESS_BARS`, `HF_HUB_VERBOSITY`, `TRANSFORMERS_VERBOSITY`, `TRANSFORMERS_NO_ADVISORY_WARNINGS`,
`TORCH_CPP_LOG_LEVEL`.
"""


class Option(NamedTuple):
    """An option or argument, as both pages show it."""

    panel: str
    name: str
    signature: str
    variable: str
    default: str
    help: str


class Command(NamedTuple):
    """What a command says of itself."""

    help: str
    usage: str
    examples: list[str]
    arguments: list[Option]
    panels: dict[str, list[Option]]

    @property
    def options(self) -> list[Option]:
        """All that have a name."""
        return [option for panel in self.panels.values() for option in panel]


def commands() -> dict[str, Command]:
    """Return every command by its name, those of groups by both words."""
    group: Any = typer.main.get_command(app)
    with Context(group, info_name="switchrun") as context:
        return dict(_commands(group, context, ""))


def _commands(group: Any, context: Any, prefix: str) -> Iterator[tuple[str, Command]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        with Context(command, info_name=name, parent=context) as inner:
            if hasattr(command, "list_commands"):
                yield from _commands(command, inner, f"{prefix}{name} ")
            else:
                yield f"{prefix}{name}", _command(command, inner)


def _command(command: Any, context: Any) -> Command:
    text, examples = command_help.split_examples(command.help)
    options = [each for each in command.params if not command_help.is_argument(each)]
    return Command(
        _escape(text),
        command_help.usage(command, context),
        examples,
        [_option(each, context) for each in command.params if each not in options],
        {
            title: [_option(each, context) for each in members]
            for title, members in command_help.panels(options).items()
        },
    )


def _option(parameter: Any, context: Any) -> Option:
    if command_help.is_argument(parameter):
        return Option("", parameter.metavar, parameter.metavar, "", "", _escape(parameter.help))
    default = "required" if parameter.required else command_help.default(parameter)
    return Option(
        parameter.rich_help_panel or command_help.Panel.OPTIONS,
        command_help.long_name(parameter),
        command_help.signature(parameter, context),
        parameter.envvar or "",
        default,
        _escape(parameter.help),
    )


def reference() -> str:
    """Return docs/cli.md."""
    found = commands()
    shared = _shared(found)
    parts = [_CLI_HEAD]
    for name, command in found.items():
        parts.append(f"## switchrun {name}\n\n    switchrun {name} {command.usage}\n\n{command.help}\n")
        parts += [*(f"    {line}" for line in command.examples), ""]
        parts += [*_option_list(command.arguments), ""] if command.arguments else []
        for title, options in command.panels.items():
            own = [option for option in options if option not in shared]
            names = ", ".join(f"`{option.name}`" for option in options if option in shared)
            if own:
                parts += [f"{title}:\n", *_option_list(own), *([f"- also {names}"] if names else []), ""]
            else:
                parts.append(f"{title}: {names}\n")
    parts.append(f"## {_SHARED}\n")
    for panel in command_help.Panel:
        members = [option for option in shared if option.panel == panel]
        parts += [f"{panel}:\n", *_option_list(members), ""] if members else []
    return "\n".join(parts)


def _shared(found: dict[str, Command]) -> list[Option]:
    """Return the options that two commands or more take in the same form; of each name the commonest form."""
    counts = Counter(option for command in found.values() for option in command.options)
    forms: dict[str, Option] = {}
    for option, count in counts.most_common():
        if count > 1:
            forms.setdefault(option.name, option)
    return list(forms.values())


def environment() -> str:
    """Return docs/environment.md."""
    parts = [_ENVIRONMENT_HEAD, *_table("variable", "option", "commands", "default")]
    takers: dict[str, dict[str, Option]] = {}
    for name, command in commands().items():
        for option in command.options:
            if option.variable:
                takers.setdefault(option.variable, {})[name] = option
    for variable, by_command in takers.items():
        names = dict.fromkeys(f"`{option.name}`" for option in by_command.values())
        parts.append(_row(f"`{variable}`", ", ".join(names), ", ".join(by_command), _defaults(by_command)))
    for title, variables in _OTHER_VARIABLES.items():
        parts += [f"\n## {title}\n", *(f"- `{name}`: {text}" for name, text in variables.items())]
    return "\n".join([*parts, "", _ENVIRONMENT_TAIL])


def _defaults(by_command: dict[str, Option]) -> str:
    """Return the default that most commands have, then those that differ from it."""
    usual = Counter(option.default for option in by_command.values()).most_common(1)[0][0]
    others = [f"{name}: {option.default}" for name, option in by_command.items() if option.default != usual]
    return "; ".join([usual, *others])


def _escape(text: str) -> str:
    return text.replace("<", "&lt;")


def _option_list(options: list[Option]) -> Iterator[str]:
    for option in options:
        default = f" ({option.default})" if option.default else ""
        yield f"- `{option.signature}`{default}: {option.help}"


def _table(*titles: str) -> Iterator[str]:
    yield _row(*titles)
    yield _row(*["---"] * len(titles))


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


PAGES = {"cli.md": reference, "environment.md": environment}


def main() -> int:
    """Write the pages, or check them if the first argument is `--check`."""
    if sys.argv[1:] != ["--check"]:
        for name, page in PAGES.items():
            (DOCS / name).write_text(page(), encoding="utf-8")
        return 0
    stale = [name for name, page in PAGES.items() if (DOCS / name).read_text(encoding="utf-8") != page()]
    for name in stale:
        print(f"docs/{name} is stale; run: python tools/cli_reference.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
