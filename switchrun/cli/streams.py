"""What comes in on stdin and goes out on stdout and stderr: whole lines, UTF-8, one input a line."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from io import BufferedIOBase
from select import select
from typing import Any, NoReturn

from switchrun.cli.signals import SIGNALS
from switchrun.errors import InputError, SwitchrunError, UsageError, printable
from switchrun.units import MIB

#: A longer line is refused instead of read: a file without line breaks must not break the promise on memory.
MAX_LINE_BYTES = MIB
#: Read at once, if there is as much: what a pipe holds. No less than the stream's own buffer, or `select` would not see
#: what waits there.
_CHUNK_BYTES = 64 * 1024

_NOT_UTF8_HINT = "convert it, for example with: iconv -f LATIN1 -t UTF-8"


@dataclass(frozen=True, slots=True)
class Entry:
    """One input as it came in, and why it cannot be used, if so.

    `id` is its position, from 0. `text` has no line end, and U+FFFD for bytes that are not UTF-8. `checked` is what the
    command made of it.
    """

    id: int
    text: str
    error: InputError | None = None
    checked: Any = None


def read_arguments(texts: Iterable[str]) -> Iterator[Entry]:
    """Yield each TEXT argument."""
    for position, text in enumerate(texts):
        # Python hands bytes that are not UTF-8 to a program as lone surrogates.
        yield decode(position, os.fsencode(text))


class LineReader:
    r"""The lines of a stream as entries, each as soon as it is there; to iterate over them waits for the next one.

    A line ends with `\n` or `\r\n`; the last one may have no end. A byte order mark at the start is dropped.
    """

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream = stream
        self._entries: deque[Entry] = deque()
        self._position = 0
        self._begun = bytearray()
        self._too_long = self._ended = False

    def __iter__(self) -> LineReader:
        return self

    def __next__(self) -> Entry:
        while not self._entries:
            if self._ended:
                raise StopIteration
            self._read()
        return self._entries.popleft()

    def ready(self) -> bool:
        """Whether the next line is there, or the end; reads what is there, and waits for nothing."""
        while not (self._entries or self._ended or self._too_long) and select([self._stream], [], [], 0)[0]:
            self._read()
        return self._ended or bool(self._entries)

    def _read(self) -> None:
        chunk = self._stream.read1(_CHUNK_BYTES)
        for number, part in enumerate(chunk.split(b"\n")):
            if number:
                self._end_line()
            if not self._too_long:
                self._begun += part
            if len(self._begun) >= MAX_LINE_BYTES:
                self._too_long = True
                self._begun.clear()
        if not chunk:
            self._ended = True
            if self._begun or self._too_long:
                self._end_line()

    def _end_line(self) -> None:
        if self._too_long:
            error = InputError(f"the line is longer than {MAX_LINE_BYTES // MIB} MiB", "put one input on each line")
            entry = Entry(self._position, "", error)
        else:
            line = bytes(self._begun)
            if self._position == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            entry = decode(self._position, line.removesuffix(b"\r"))
        self._entries.append(entry)
        self._position += 1
        self._begun.clear()
        self._too_long = False


class TypedLines:
    """What a person types at a prompt as entries, as `LineReader` has them; a blank line is none.

    With line editing, and a history that goes with the process, where Python has `readline`.
    """

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt
        self._typed: deque[str] = deque()
        self._position = 0
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr] # a TextIOWrapper

    def __iter__(self) -> TypedLines:
        return self

    def __next__(self) -> Entry:
        while not self._typed:
            # What is pasted may be several lines.
            self._typed.extend(line for line in self._ask().split("\n") if line.strip())
        self._position += 1
        return decode(self._position - 1, self._typed.popleft().encode("utf-8", "surrogateescape"))

    def ready(self) -> bool:
        """Whether the next line is there: a person waits for the answer to each."""
        return bool(self._typed)

    def _ask(self) -> str:
        with contextlib.suppress(ImportError):
            import_module("readline")  # `input` finds it by itself
        try:
            # It edits lines only on descriptors 0 and 1; the latter is stderr's, see `prepare_output`.
            with open(1, "w", encoding="utf-8", closefd=False) as shown, contextlib.redirect_stdout(shown):
                return input(self._prompt)
        except BaseException as end:
            if self._prompt:
                report_lines("\n")
            if isinstance(end, EOFError):
                raise StopIteration from None
            raise


def stdin_lines() -> LineReader:
    """Return the lines of stdin; a `UsageError` if it is closed."""
    if sys.stdin is None:
        raise UsageError("there is no TEXT, and stdin is closed", "give TEXT, or pipe lines in")
    return LineReader(sys.stdin.buffer)  # type: ignore[arg-type] # a BufferedReader


def someone_types() -> bool:
    """Whether stdin is a terminal that someone sees a prompt on."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()


def prepare_output() -> None:
    """Make stdout and stderr UTF-8 whatever the locale says, and stdout Python's alone; a closed stderr drops all.

    What C code writes to stdout, whose descriptor is always 1, goes to stderr.
    """
    closed = [number for number in (0, 1, 2) if not _is_open(number)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which no other file may have
    if 2 in closed:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - it lives as long as the process
    stderr: Any = sys.stderr
    stderr.reconfigure(encoding="utf-8", errors="backslashreplace", newline="\n")
    if 1 not in closed:
        answers = open(os.dup(1), "w", encoding="utf-8", errors="backslashreplace", newline="\n")  # noqa: SIM115
        sys.stdout = sys.__stdout__ = answers  # type: ignore[misc] # the one that `write_answer` and tables mean
        os.dup2(2, 1)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def without_stdout(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return a command during which `sys.stdout` is stderr: what a library prints is no answer."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        with contextlib.redirect_stdout(sys.stderr):
            return command(*args, **kwargs)

    return run


def leave(code: int) -> NoReturn:
    """End the process without Python's own end, in which a signal would kill it."""
    for stream in (sys.__stdout__, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
    os._exit(code)


def write_answer(lines: str) -> None:
    """Write whole lines to stdout and flush them; a signal waits until they are out.

    Raises:
        BrokenPipeError: Nobody reads any more.
        SwitchrunError: stdout is closed, or the disk is full.
        Interrupted: A signal came; the lines are written.
    """
    stdout = sys.__stdout__
    if stdout is None:
        raise UsageError("stdout is closed, so there is nowhere to write the answer to")
    with SIGNALS.held():
        try:
            stdout.write(lines)
            stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            drop_stdout()
            raise SwitchrunError(f"cannot write the answer to stdout: {error.strerror}") from error


def drop_stdout() -> None:
    """Drop what is left in stdout's buffer, so that Python does not fail a second time when it exits."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.__stdout__.fileno())  # type: ignore[union-attr] # it was written to


def report(message: str) -> None:
    """Write one line for a human to stderr: `switchrun: message`."""
    report_lines(f"switchrun: {printable(' '.join(message.split()))}\n")


def report_lines(lines: str) -> None:
    """Write lines for a human to stderr. If stderr takes nothing, go on without it."""
    with contextlib.suppress(OSError):
        sys.stderr.write(lines)
        sys.stderr.flush()


def confirmed(question: str) -> bool:
    """Ask on stderr, and return whether the answer on stdin is yes."""
    report_lines(question)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def decode(position: int, raw: bytes) -> Entry:
    """Return an input of these bytes, marked if they are not UTF-8."""
    try:
        return Entry(position, raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        message = f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}"
        return Entry(position, raw.decode("utf-8", "replace"), InputError(message, _NOT_UTF8_HINT))
