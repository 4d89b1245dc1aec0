"""The `switchrun` command: its subcommands, and the message and exit code of an exception."""

from __future__ import annotations

import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from switchrun import __version__
from switchrun.cli.bench import bench
from switchrun.cli.commands import Command, Group
from switchrun.cli.config import app as config
from switchrun.cli.config_file import Defaults
from switchrun.cli.doctor import doctor
from switchrun.cli.eval import evaluate
from switchrun.cli.fill import fill
from switchrun.cli.generate import generate
from switchrun.cli.map import map_inputs
from switchrun.cli.models import models
from switchrun.cli.offload import app as offload
from switchrun.cli.plan import plan
from switchrun.cli.prepare import prepare
from switchrun.cli.score import score
from switchrun.cli.serve import serve
from switchrun.cli.signals import SIGNALS, Interrupted
from switchrun.cli.startup import debugging, let_threads_sleep, share_one_heap
from switchrun.cli.streams import drop_stdout, prepare_output, report, without_stdout, write_answer
from switchrun.errors import SwitchrunError, UsageError
from switchrun.machine.limits import refused_by_system

EXIT_BROKEN_PIPE = 141

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
app = typer.Typer(cls=Group, context_settings=_CONTEXT, pretty_exceptions_enable=False, rich_markup_mode=None)
_answer, _prepare, _measure = (
    partial(app.command, cls=Command, rich_help_panel=panel) for panel in ("Answer", "Prepare", "Measure")
)
_answer()(fill)
_answer()(generate)
_answer()(score)
_answer("map")(map_inputs)
_answer()(serve)
_prepare()(plan)
_prepare()(prepare)
_prepare()(models)
app.add_typer(offload, name="offload", rich_help_panel="Prepare")
app.add_typer(config, name="config", rich_help_panel="Prepare")
_measure()(bench)
_measure("eval")(evaluate)
_measure()(doctor)
for each in (*app.registered_commands, *offload.registered_commands, *config.registered_commands):
    assert each.callback is not None
    each.callback = without_stdout(each.callback)


def _show_version(wanted: bool) -> None:
    if wanted:
        write_answer(f"switchrun {__version__}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def switchrun(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", "-v", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run Switch Transformers that are larger than memory.

    `switchrun COMMAND -h` explains a command. Without --model, a small demo model answers.

    Examples:
        switchrun fill "A <extra_id_0> walks into a bar."
        switchrun plan --model google/switch-c-2048 --cpu-memory 6GiB
        switchrun doctor
    """
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError("the current folder was deleted", "go to one that is there") from error
    if context.invoked_subcommand is None:
        write_answer(f"{context.get_help()}\n")
    else:
        context.default_map = context.obj.of(context.command)


def main() -> NoReturn:
    """Run the command line; the entry of the console script."""
    prepare_output()
    let_threads_sleep()
    share_one_heap()
    try:
        SIGNALS.install()
        code = run(sys.argv[1:])
        SIGNALS.release()
    except Interrupted as interrupted:
        code = interrupted.exit_code
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command, and turn whatever it raises into a line on stderr and the exit code to return.

    Raises:
        Interrupted: A signal came; whatever a library made of it does not count.
    """
    defaults = Defaults()
    try:
        code: int | None = app(arguments, prog_name="switchrun", standalone_mode=False, obj=defaults)
        return code or 0
    except SystemExit as end:
        SIGNALS.check()
        # Typer ends the program itself when a pipe breaks, with exit code 1.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        drop_stdout()
        return EXIT_BROKEN_PIPE
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic in a library written in Rust is no Exception
        SIGNALS.check()
        if debugging():
            traceback.print_exc()
        error = refused_by_system(error) or error
        if isinstance(error, SwitchrunError):
            report(defaults.explain(error.on_command_line() if isinstance(error, UsageError) else str(error)))
            return error.exit_code
        report(f"internal error: {type(error).__name__}: {error} (set SWITCHRUN_DEBUG=1 to see where)")
        return SwitchrunError.exit_code
