"""Every error a user can meet, as one tree; each class owns the exit code of the command line.

    SwitchrunError              1  a bug in switchrun, if nothing below fits
    ├── UsageError              2  options that contradict each other
    ├── InputError              4  a text that cannot be filled
    ├── ModelError              5  no such model, not a Switch model, or a kind that is not supported
    ├── BudgetError             6  it does not fit into the memory that was allowed
    ├── CorruptCheckpointError  7  a checkpoint or offload file that is damaged or incomplete
    ├── NetworkError            8  the Hub could not be reached
    └── StorageError            9  the offload folder cannot be written: no space, or no right to

Exit code 3 (some inputs failed, others were answered) and those of signals (130, 141, 143) belong to
`switchrun.cli`: no exception stands for them.
"""

from __future__ import annotations


class SwitchrunError(Exception):
    """The base of every error that switchrun raises on purpose.

    Args:
        message: What is wrong, in one line, naming the file, tensor or option.
        hint: What to do about it, in one line; empty if there is nothing to say.
    """

    exit_code = 1
    kind = "internal"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(SwitchrunError):
    """Options or arguments that cannot be used together, or that have no meaning."""

    exit_code = 2
    kind = "usage"


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
    """The Hub could not be reached, or it refused."""

    exit_code = 8
    kind = "network"


class StorageError(SwitchrunError):
    """The offload folder cannot be written or cleared: the disk is full, or it may not be changed."""

    exit_code = 9
    kind = "storage"
