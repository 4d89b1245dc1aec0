"""The `switchrun` command: its subcommands, and the message and exit code of an exception."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from switchrun import __version__
from switchrun.cli.bench import bench
from switchrun.cli.doctor import doctor
from switchrun.cli.eval import evaluate
from switchrun.cli.fill import fill
from switchrun.cli.generate import generate
from switchrun.cli.map import map_inputs
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

# Without rich the help is plain, and appears in a fifth of the time.
app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(fill)
app.command()(generate)
app.command()(score)
app.command("map")(map_inputs)
app.command()(plan)
app.command()(serve)
app.command()(bench)
app.command("eval")(evaluate)
app.command()(prepare)
app.add_typer(offload, name="offload")
app.command()(doctor)
for each in (*app.registered_commands, *offload.registered_commands):
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
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Run Switch Transformers that are larger than memory."""
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError("the current folder was deleted", "go to one that is there") from error
    if context.invoked_subcommand is None:
        raise UsageError("a command is missing", "see: switchrun --help")


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
    try:
        code: int | None = app(arguments, prog_name="switchrun", standalone_mode=False)
        return code or 0
    except SystemExit as end:
        SIGNALS.check()
        # Typer ends the program itself when a pipe breaks, with exit code 1.
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        drop_stdout()
        return EXIT_BROKEN_PIPE
    except typer.TyperException as error:
        context: typer.Context | None = getattr(error, "ctx", None)
        report(f"{error.format_message()} (see: {context.command_path if context else 'switchrun'} --help)")
        return error.exit_code
    except (Interrupted, KeyboardInterrupt):
        raise
    except BaseException as error:  # a panic in a library written in Rust is no Exception
        SIGNALS.check()
        if debugging():
            traceback.print_exc()
        error = refused_by_system(error) or error
        if isinstance(error, SwitchrunError):
            report(error.on_command_line() if isinstance(error, UsageError) else str(error))
            return error.exit_code
        report(f"internal error: {type(error).__name__}: {error} (set SWITCHRUN_DEBUG=1 to see where)")
        return SwitchrunError.exit_code
