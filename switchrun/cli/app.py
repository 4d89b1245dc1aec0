"""The `switchrun` command: its subcommands, and the message and exit code of an exception."""

from __future__ import annotations

import errno
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
from switchrun.cli.offload import app as offload
from switchrun.cli.plan import plan
from switchrun.cli.prepare import prepare
from switchrun.cli.signals import SIGNALS, Interrupted
from switchrun.cli.startup import debugging
from switchrun.cli.streams import drop_stdout, prepare_output, report, without_stdout, write_answer
from switchrun.errors import BudgetError, SwitchrunError, UsageError

EXIT_BROKEN_PIPE = 141
#: How the system says that it gives no more memory or open files, and how libraries say it.
_SHORT = {errno.ENOMEM, errno.EMFILE, errno.ENFILE}
_REFUSALS = (
    "an't allocate memory",
    "annot allocate memory",
    "failed to map segment",
    "bad_alloc",
    "can't start new thread",
    "Too many open files",
)

# Without rich the help is plain, and appears in a fifth of the time.
app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)
app.command()(fill)
app.command()(plan)
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
        shortage = None if isinstance(error, BudgetError) else _find_shortage(error)
        if shortage is not None:
            report(shortage)
            return BudgetError.exit_code
        if isinstance(error, SwitchrunError):
            report(error.on_command_line() if isinstance(error, UsageError) else str(error))
            return error.exit_code
        report(f"internal error: {type(error).__name__}: {error} (set SWITCHRUN_DEBUG=1 to see where)")
        return SwitchrunError.exit_code


def _find_shortage(error: BaseException | None) -> str | None:
    """Return what to say if an error comes of memory, threads or files that the system refused; else None.

    torch's own errors are known by their names: it is not to be imported for the question.
    """
    found: BaseException | None = None
    while error is not None:
        if (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or (isinstance(error, OSError) and error.errno in _SHORT)
            or (isinstance(error, (RuntimeError, ImportError)) and any(words in str(error) for words in _REFUSALS))
        ):
            found = error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if found is None:
        return None
    if "Too many open files" in str(found):
        return f"{found} (allow more with: ulimit -n 1024)"
    hint = "allow less with --cpu-memory or --gpu-memory, or lift the limits that ulimit -a shows"
    return f"out of memory: {str(found) or 'the system gave no more'} ({hint})"
