"""Typer's commands, with switchrun's help, and with plain words for what is wrong with a command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from switchrun.cli.help import is_argument, long_name, signature, summary, write_help
from switchrun.errors import UsageError, printable


class _OwnHelp:
    """The two methods by which typer writes help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        write_help(self, ctx, formatter)

    def get_short_help_str(self, limit: int = 0) -> str:  # noqa: ARG002 - typer's; nothing is cut
        return summary(self)


class Command(_OwnHelp, TyperCommand):
    """A command; the examples at the end of its docstring are those of its help."""

    allow_extra_args = True  # so that they are refused here

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: D102 - typer's
        with _plain_words(ctx):
            left = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            _check_values(ctx)
            if left:
                raise UsageError(f"unexpected argument {_quoted(left[0])}", _see(ctx))
        return left


class Group(_OwnHelp, TyperGroup):
    """A command that has commands of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: D102 - typer's
        with _plain_words(ctx):
            return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:  # noqa: D102 - typer's
        if args[0] not in self.commands and not ctx.resilient_parsing:
            raise UsageError(f"there is no command {_quoted(args[0])}{_nearest(args[0], self.commands)}", _see(ctx))
        return super().resolve_command(ctx, args)


@contextmanager
def _plain_words(context: Any) -> Iterator[None]:
    try:
        yield
    except typer.TyperException as error:
        raise UsageError(_what_is_wrong(error, context), _see(context)) from error


def _what_is_wrong(error: Any, context: Any) -> str:
    name: str | None = getattr(error, "option_name", None)
    parameter = getattr(error, "param", None)
    if name is not None and hasattr(error, "possibilities"):
        for taker, command in getattr(context.command, "commands", {}).items():
            if any(name in each.opts for each in command.params):
                return f"{name} is an option of a command: write {context.command_path} {taker} {name}"
        return f"there is no option {name}{_nearest(name, _names(context))}"
    if name is not None:
        option = _names(context)[name]
        return f"{name} takes no value" if option.is_flag else f"{name} needs a value: {signature(option, context)}"
    if parameter is None:
        return str(error.format_message())
    if hasattr(error, "param_type"):
        called = parameter.metavar if is_argument(parameter) else signature(parameter, context)
        return f"{called} is missing"
    return f"{_called(parameter, context)}: {_what_is_wrong_with_value(error, parameter)}"


def _what_is_wrong_with_value(error: Any, parameter: Any) -> str:
    """Put pydantic's words, by which typer checks values, into plain ones."""
    problems = error.__cause__.errors() if hasattr(error.__cause__, "errors") else []
    if not problems:
        return str(error.message)
    kind, given, limits = problems[0]["type"], _quoted(problems[0]["input"]), problems[0].get("ctx", {})
    if "error" in limits:
        return str(limits["error"]).rstrip(".")
    if kind == "less_than_equal":
        return f"{given} is more than {limits['le']}"
    number = "number" if kind.startswith("float") else "whole number"
    return f"{given} is not a {number}" + ("" if parameter.min is None else f" of at least {parameter.min}")


def _check_values(context: Any) -> None:
    """Refuse the name of an option in the place of a value, which was forgotten."""
    for option in context.command.params:
        given = context.params.get(option.name)
        if isinstance(given, str) and given in _names(context) and not is_argument(option):
            raise UsageError(
                f"{long_name(option)} needs a value, and {given} is an option: {signature(option, context)}",
                _see(context),
            )


def _names(context: Any) -> dict[str, Any]:
    options = [each for each in context.command.get_params(context) if not is_argument(each)]
    return {name: each for each in options for name in (*each.opts, *each.secondary_opts)}


def _called(parameter: Any, context: Any) -> str:
    """Return where a value came from: an option, an argument, or a variable."""
    source = context.get_parameter_source(parameter.name)
    if parameter.envvar and source is not None and source.name == "ENVIRONMENT":
        return str(parameter.envvar)
    return str(parameter.metavar) if is_argument(parameter) else long_name(parameter)


def _nearest(word: str, known: Iterable[str]) -> str:
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _quoted(text: object) -> str:
    return printable(f"'{text}'", 100)


def _see(context: Any) -> str:
    return f"see: {context.command_path} --help"
