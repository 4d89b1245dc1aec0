"""The console script, and `python -m switchrun`: sees to signals, and only then imports the command line."""

from __future__ import annotations

from typing import NoReturn

from switchrun.cli.signals import quit_on_signals


def main() -> NoReturn:
    """Run the command line."""
    quit_on_signals()
    # Takes a tenth of a second, in which Ctrl-C would show where Python is.
    from switchrun.cli.app import main as run
    from switchrun.cli.streams import leave

    try:
        run()
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    main()
