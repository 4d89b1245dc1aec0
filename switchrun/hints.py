"""Commands in messages, as the user can paste them."""

from __future__ import annotations

import shlex
from pathlib import Path


def command(
    *words: str, model: str | None = None, dtype: str | None = None, offload_folder: str | Path | None = None
) -> str:
    """Give a command of switchrun with the user's own options, quoted for the shell.

    Args:
        words: What comes after `switchrun`.
        model: As `--model` has it; None, as of the others, leaves it out.
        dtype: As `--dtype` has it.
        offload_folder: As `--offload-folder` has it.
    """
    given = (("--model", model), ("--dtype", dtype), ("--offload-folder", offload_folder))
    options = [word for option, value in given if value is not None for word in (option, str(value))]
    return shlex.join(["switchrun", *words, *options])
