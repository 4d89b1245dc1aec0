"""Every error a user can meet, as one tree; each class owns the exit code of the command line.

    SwitchrunError              1  a bug in switchrun, if nothing below fits
    ├── UsageError              2  options that contradict each other
    ├── InputError              4  a text that cannot be filled
    ├── ModelError              5  no such model, not a Switch model, or a kind that is not supported
    ├── BudgetError             6  it does not fit into the memory that was allowed
    ├── CorruptCheckpointError  7  a checkpoint or offload file that is damaged or incomplete
    ├── NetworkError            8  the Hub or a server could not be reached
    └── StorageError            9  the offload folder or an output cannot be written: no space, or no right to

Exit code 3 (some inputs failed, others were answered) and those of signals (129, 130, 141, 143) belong to
`switchrun.cli`: no exception stands for them.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

#: No message is longer: it may quote a file.
_MOST_CHARACTERS = 4_000
_SPACES = re.compile(r"[\t\n\v\f\r]")
#: What a terminal obeys instead of showing it, or what is no character.
OBEYED = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # control codes, except tab and line break
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction of writing
    "\u2028\u2029"  # line and paragraph separator
    "\ud800-\udfff"  # surrogates
    "]"
)


def escape(text: str) -> str:
    r"""Return a text in which every code that a terminal would obey is written out, as Python does it: `\x1b`.

    These are control codes, codes that change the direction of writing, line separators, and halves of characters. Tabs
    and line breaks stay, and so do joiners and marks, which emoji and many scripts need.
    """
    return OBEYED.sub(lambda code: ascii(code[0])[1:-1], text)


def printable(text: object, most: int = _MOST_CHARACTERS) -> str:
    """Return a text of which a terminal obeys nothing, in one line; of a long one both ends.

    Whatever comes from a file passes through here on its way to people: names of tensors, values of settings, words of
    libraries. Line breaks and tabs become spaces.
    """
    shown = str(text)
    if len(shown) > most:
        shown = shown[: most // 2] + "…" + shown[len(shown) - (most - most // 2 - 1) :]
    return escape(_SPACES.sub(" ", shown))


class SwitchrunError(Exception):
    """The base of every error that switchrun raises on purpose.

    The message names the file, tensor or option in one line; the hint says in another one what to do, or is empty.
    """

    exit_code = 1
    kind = "internal"

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = printable(message)
        self.hint = printable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(SwitchrunError):
    """Options or arguments that cannot be used together, or that have no meaning.

    `option` is the argument that it is about, such as `cpu_memory`; the message begins with it.
    """

    exit_code = 2
    kind = "usage"

    def __init__(self, message: str, hint: str = "", option: str = "") -> None:
        super().__init__(message, hint)
        self.option = option

    def on_command_line(self) -> str:
        """Return the text with the option as it is called there: `--cpu-memory`."""
        flag = f"--{self.option.replace('_', '-')}" if self.option else ""
        return flag + str(self).removeprefix(self.option)


class InputError(SwitchrunError):
    """A text that cannot be filled: no sentinel, sentinels out of order, too long, not UTF-8."""

    exit_code = 4
    kind = "input"


class ModelError(SwitchrunError):
    """No model at that place, not a Switch Transformer, or one of an unsupported kind."""

    exit_code = 5
    kind = "model"


class BudgetError(SwitchrunError):
    """The model, or a request, does not fit into the memory that was allowed."""

    exit_code = 6
    kind = "budget"


class CorruptCheckpointError(SwitchrunError):
    """A checkpoint or offload file that is damaged, truncated, incomplete or inconsistent."""

    exit_code = 7
    kind = "corrupt"


class NetworkError(SwitchrunError):
    """The Hub or a server could not be reached, or it refused, or answered what it should not."""

    exit_code = 8
    kind = "network"


class StorageError(SwitchrunError):
    """The offload folder or an output cannot be written or cleared: the disk is full, or it may not be changed."""

    exit_code = 9
    kind = "storage"


def command(
    *words: str, model: str | None = None, dtype: str | None = None, offload_folder: str | Path | None = None
) -> str:
    """Return a command, `switchrun` with these words and the options that are not None, quoted for the shell."""
    given = (("--model", model), ("--dtype", dtype), ("--offload-folder", offload_folder))
    options = [word for option, value in given if value is not None for word in (option, str(value))]
    return shlex.join(["switchrun", *words, *options])


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise UsageError for what is not a whole number of at least that, or too large to reckon with."""
    if type(value) is not int or value < least:
        raise UsageError(f"{name}: {printable(repr(value), 100)} is not a whole number above {least - 1}", option=name)
    if value >= 2**31:
        raise UsageError(f"{name}: {printable(value, 100)} is more than {2**31 - 1}", option=name)
