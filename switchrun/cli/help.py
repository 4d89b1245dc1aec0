"""The text of `--help`: usage, options in panels, examples at the end. Without rich, which would double its time."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from enum import StrEnum
from typing import Any

#: Where the text of an option or a command begins, unless its name is longer.
_COLUMN = 28
#: So few options need no panels.
_FEW = 10
_EXAMPLES = "\n\nExamples:\n"


class Panel(StrEnum):
    """Where help lists an option, in this order; in `OPTIONS` are those that most people need, and what names none."""

    OPTIONS = "Options"
    INPUT = "Input options"
    MODEL = "Model options"
    MEMORY = "Memory options"
    GENERATION = "Generation options"
    ESTIMATE = "Estimate options"
    MEASUREMENT = "Measurement options"
    SERVER = "Server options"
    OUTPUT = "Output options"


def write_help(command: Any, context: Any, formatter: Any) -> None:
    """Write the help of a command, or of a group, into typer's formatter."""
    parameters = [each for each in command.get_params(context) if not getattr(each, "hidden", False)]
    arguments = [each for each in parameters if is_argument(each)]
    formatter.write_usage(context.command_path, usage(command, context))
    text, examples = split_examples(command.help or "")
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    sections: list[tuple[str, Iterable[str]]] = [("", _wrapped(each, formatter.width)) for each in paragraphs]
    if arguments:
        rows = [(each.metavar, described(each)) for each in arguments]
        sections.append(("Arguments", _table(rows, formatter.width)))
    commands = _command_panels(command)
    column = max((len(name) for rows in commands.values() for name, _ in rows), default=0) + 4
    sections += [(title, _table(rows, formatter.width, column)) for title, rows in commands.items()]
    for title, options in panels(each for each in parameters if not is_argument(each)).items():
        rows = [(signature(each, context), described(each)) for each in options]
        sections.append((title, _table(rows, formatter.width)))
    sections.append(("Environment variables", _wrapped(_environment(parameters), formatter.width)))
    sections.append(("Examples", [f"  {line}" for line in examples]))
    for title, lines in sections:
        body = "\n".join(lines)
        if body:
            heading = f"{title}:\n" if title else ""
            formatter.write(f"\n{heading}{body}\n")


def usage(command: Any, context: Any) -> str:
    """Return what follows a command's name: what it cannot do without, then the rest."""
    if hasattr(command, "commands"):
        return "COMMAND [OPTIONS]"
    words = ["[OPTIONS]"]
    for each in command.params:
        if is_argument(each):
            name = each.metavar if each.nargs == 1 else f"{each.metavar} ..."
            words.append(name if each.required else f"[{name}]")
        elif each.required:
            words.append(f"{long_name(each)} {value(each, context)}")
    return " ".join(words)


def summary(command: Any) -> str:
    """Return the first sentence of a command's help."""
    return split_examples(command.help or "")[0].partition("\n\n")[0].rstrip(".").replace("\n", " ")


def split_examples(text: str) -> tuple[str, list[str]]:
    """Return a command's help without its examples, and the examples, a command each."""
    text, _, examples = text.partition(_EXAMPLES)
    return text.strip(), textwrap.dedent(examples).splitlines()


def panels(options: Iterable[Any]) -> dict[str, list[Any]]:
    """Return options by the title of their panel, in the order of `Panel`."""
    options = list(options)
    few = len(options) < _FEW
    found: dict[str, list[Any]] = {str(panel): [] for panel in Panel}
    for each in options:
        found[Panel.OPTIONS if few else each.rich_help_panel or Panel.OPTIONS].append(each)
    return {title: members for title, members in found.items() if members}


def is_argument(parameter: Any) -> bool:
    """Whether it has a place on the command line instead of a name."""
    return bool(parameter.param_type_name == "argument")


def long_name(option: Any) -> str:
    """Return `--output` of `-o, --output`."""
    return str(max(option.opts, key=len))


def value(option: Any, context: Any) -> str:
    """Return what stands for an option's value; nothing for a flag."""
    # typer writes choices as <a|b>
    return "" if option.is_flag else str(option.metavar or option.display_type(context).strip("<>"))


def signature(option: Any, context: Any) -> str:
    """Return an option as help and the documentation name it: `-o, --output OUT`."""
    names = "/".join((", ".join(sorted(option.opts, key=len)), *option.secondary_opts))
    return f"{names} {value(option, context)}".rstrip()


def default(option: Any) -> str:
    """Return the default as help shows it, or nothing."""
    if isinstance(option.show_default, str):
        return option.show_default
    if option.secondary_opts:
        return str((option.opts if option.default else option.secondary_opts)[0].removeprefix("--"))
    if option.is_flag or option.default is None or not option.show_default:
        return ""
    return str(getattr(option.default, "value", option.default))


def described(parameter: Any) -> str:
    """Return a parameter's help with its default."""
    text = parameter.help or ""
    if is_argument(parameter):
        return text
    shown = "required" if parameter.required else f"default:\xa0{default(parameter)}" if default(parameter) else ""
    return f"{text} [{shown}]" if shown else text


def _command_panels(command: Any) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for name, each in getattr(command, "commands", {}).items():
        if not each.hidden:
            found.setdefault(each.rich_help_panel or "Commands", []).append((name, summary(each)))
    return found


def _environment(parameters: list[Any]) -> str:
    options = [each for each in parameters if each.envvar]
    if not options:
        return ""
    first, *others = map(long_name, options)
    text = f"{options[0].envvar} sets the default of {first}."
    return text + (f" Variables like it set those of {', '.join(others)}." if others else "")


def _table(rows: Iterable[tuple[str, str]], width: int, column: int = _COLUMN) -> Iterator[str]:
    for name, text in rows:
        lines = _wrapped(text, width, column)
        if lines and len(name) + 4 <= column:
            lines[0] = f"  {name}".ljust(column) + lines[0][column:]
        else:
            yield f"  {name}"
        yield from lines


def _wrapped(text: str, width: int, indent: int = 2) -> list[str]:
    wrapper = textwrap.TextWrapper(width, break_on_hyphens=False, break_long_words=False)
    wrapper.initial_indent = wrapper.subsequent_indent = " " * indent
    # the space in "[default: 64]" keeps together what it parts
    return [line.replace("\xa0", " ") for line in wrapper.wrap(text)]
