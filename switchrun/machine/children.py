"""Starts this Python again in a process of its own, and ends it: every child of switchrun comes from here.

Run as a file it is the child's first half: it finds the package, and runs a module of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def start_python(
    module: str, *, folder: Path | None = None, stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a module, with pipes at its stdout and stderr. No module of the current folder is imported.

    It has a session of its own: Ctrl-C is for the parent, which ends the child. If the parent dies, the child does too.

    Args:
        module: It is run as `python -m` would.
        folder: Where it runs, and where modules are looked for first: one that the caller trusts.
        stdin: What it reads, as for `subprocess.Popen`.

    Raises:
        BudgetError: The system gives no more processes.
    """
    command = [sys.executable, "-P", __file__, module]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # -P, for what the child starts in turn
    if folder is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))

    def start(executable: str | None = None) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            executable=executable,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )

    try:
        return start()
    except (FileNotFoundError, PermissionError):
        # By its name it is gone (an update), or out of reach (another user's folder). It still is what runs here.
        return start("/proc/self/exe")
    except BlockingIOError as error:
        from switchrun.errors import BudgetError  # the child's first half does not find it

        raise BudgetError("the system gives no more processes", "end others, or raise: ulimit -u") from error


def end(child: subprocess.Popen[bytes]) -> bytes:
    """Kill a child with whatever it has started, unless it has ended, and return what is left of its stdout."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    return child.communicate()[0]


def _begin() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # At the end of the path, where it shadows nothing; the package need not be installed.
    sys.path.append(str(Path(__file__).parents[2]))
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _begin()
