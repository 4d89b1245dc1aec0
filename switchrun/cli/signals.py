"""SIGINT, SIGTERM and SIGHUP end the program by an exception, but never in the middle of a line of the answer."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the program to end; not an `Exception`, so that no library takes it for a failure of its own."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


def quit_on_signals() -> None:
    """Have signals end the process at once and silently: nobody is there to catch an exception."""
    _handle_with(lambda signum, _frame: os._exit(128 + signum))


def _handle_with(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Set a handler, except for a signal that was ignored when the program started (as `nohup` and `&` do)."""
    for signum in _SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, handler)


class SignalGuard:
    """Turns the first signal into `Interrupted`; the second one kills the process at once.

    Masking the signals would not do: they could still be delivered to another thread, and Python would then run the
    handler in the main thread between the two halves of a partial write.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._holding = False
        self._at_once = False

    def install(self) -> None:
        """Take over the signals."""
        _handle_with(self._handle)
        sys.unraisablehook = self._unraisable

    def release(self) -> None:
        """Have signals end the process at once from now on: it is about to end by itself.

        Raises:
            Interrupted: A signal came, and some library swallowed it.
        """
        quit_on_signals()
        self.check()

    def check(self) -> None:
        """Raise `Interrupted` if a signal came: some library may have swallowed it, or made another error of it."""
        if self._received is not None:
            raise Interrupted(self._received)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Have signals end the process at once for as long as the block runs, in which nothing is begun or written."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold signals back for as long as the block runs.

        Raises:
            Interrupted: At the end of the block, if a signal came meanwhile, or earlier and some library swallowed it.
        """
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        self.check()

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self._at_once:
            os._exit(128 + signum)
        _handle_with(signal.SIG_DFL)
        self._received = signum
        if not self._holding:
            raise Interrupted(signum)

    def _unraisable(self, swallowed: sys.UnraisableHookArgs) -> None:
        # Raised in a `__del__`, say, it went no further than that.
        if isinstance(swallowed.exc_value, Interrupted):
            os._exit(swallowed.exc_value.exit_code)
        sys.__unraisablehook__(swallowed)


#: Handlers belong to the whole process, so there is one guard. It does nothing until `install` is called.
SIGNALS = SignalGuard()
