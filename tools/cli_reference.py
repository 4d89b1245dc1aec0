"""Write docs/cli.md from the live command line, or check that it is fresh.

python tools/cli_reference.py            writes the file
python tools/cli_reference.py --check    exits with 1 if the file is stale
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from typer import Context

from switchrun.cli.app import app

TARGET = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

_HEAD = """# Command line

Written by `tools/cli_reference.py` from the program itself; do not edit.

Exit codes: 0 all inputs answered; 1 a bug in switchrun, or the answer could not be written; 2 usage; 3 some inputs
failed, the others were answered; 4 no input could be answered; 5 model not found, or not a supported Switch model;
6 does not fit the memory allowed; 7 damaged checkpoint or offload data; 8 network; 9 the offload folder cannot be
written; 130, 141, 143 for SIGINT, a broken pipe and SIGTERM.

`SWITCHRUN_DEBUG=1` shows the traceback of an error and what the libraries say.
"""


def reference() -> str:
    """Give the page as Markdown."""
    group: Any = typer.main.get_command(app)
    parts = [_HEAD]
    with Context(group, info_name="switchrun") as context:
        for name in group.list_commands(context):
            parts += _command(group.get_command(context, name), context, name)
    return "\n".join(parts)


def _command(command: Any, parent: Any, name: str) -> Iterator[str]:
    with Context(command, info_name=name.rpartition(" ")[2], parent=parent) as context:
        if hasattr(command, "list_commands"):
            for each in command.list_commands(context):
                yield from _command(command.get_command(context, each), context, f"{name} {each}")
            return
        usage = " ".join(command.collect_usage_pieces(context))
        yield f"## switchrun {name}\n\n    switchrun {name} {usage}\n\n{_escape(command.help)}\n"
        yield "| option | environment variable | default | what it does |\n| --- | --- | --- | --- |"
        for parameter in command.params:
            yield _row(parameter, context)
        yield ""


def _row(parameter: Any, context: Any) -> str:
    if parameter.param_type_name == "argument":
        name, default = f"`{parameter.metavar}`", ""
    else:
        value = "" if parameter.is_flag else f" {parameter.metavar or parameter.display_type(context)}"
        name, default = f"`{', '.join(parameter.opts)}{value}`", _default(parameter)
    cells = (name, f"`{parameter.envvar}`" if parameter.envvar else "", default, _escape(parameter.help))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(parameter: Any) -> str:
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    if parameter.is_flag or parameter.default is None:
        return ""
    return str(getattr(parameter.default, "value", parameter.default))


def _escape(text: str) -> str:
    return text.replace("<", "&lt;")


def main() -> int:
    """Write the page, or check it if the first argument is `--check`."""
    if sys.argv[1:] == ["--check"]:
        if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == reference():
            return 0
        print("docs/cli.md is stale; run: python tools/cli_reference.py", file=sys.stderr)
        return 1
    TARGET.write_text(reference(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
