"""The libraries of the C kernels, one for each path of a processor: which are built, which can run here, which is used.

The sources are in `c/`; the package's build compiles them (`build_backend/`). The best path that the processor can run
is used, or the one that `SWITCHRUN_KERNELS` names. No torch.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from functools import cache
from pathlib import Path

from switchrun.errors import UsageError

#: From the slowest to the fastest, which is the order of the bits of `native_paths`.
PATHS = ("portable", "avx2", "avx512")
VARIABLE = "SWITCHRUN_KERNELS"
OFF = "off"

_FOLDER = Path(__file__).parent


def path() -> str | None:
    """Return the path in use: the fastest, or the one that `SWITCHRUN_KERNELS` names; None if there is none.

    Raises:
        UsageError: The one that is named is not here.
    """
    named, able = os.environ.get(VARIABLE, ""), paths()
    if named == OFF:
        return None
    if named and named not in able:
        hint = f"set it to one of {', '.join((*able, OFF))}" if able else "no kernels are built: see switchrun doctor"
        raise UsageError(f"{VARIABLE} is '{named}', which this machine does not have", f"{hint}, or unset it")
    return named or (able[-1] if able else None)


def paths() -> tuple[str, ...]:
    """Return the paths that are built and that this processor can run, the slowest first."""
    portable = library("portable")
    if portable is None:
        return ()
    able = portable.native_paths()
    return tuple(path for bit, path in enumerate(PATHS) if able >> bit & 1 and library(path) is not None)


def unusable() -> bool:
    """Whether there are libraries, but for another system, or of other sources, as after `git pull`.

    To call the latter could crash the process.
    """
    return any(_file(path).exists() for path in PATHS) and library("portable") is None


@cache
def library(path: str) -> ctypes.CDLL | None:
    """Return a path's library; None if it is not built, or of other sources than those beside it."""
    try:
        loaded = ctypes.CDLL(str(_file(path)))
        return loaded if loaded.native_sources() == _sources() else None
    except (OSError, AttributeError):
        return None


def _file(path: str) -> Path:
    return _FOLDER / f"_native_{path}.so"


@cache
def _sources() -> int:
    """Return the checksum that the build compiles into each library."""
    checksum = 0
    for source in sorted((_FOLDER / "c").glob("*.[ch]")):
        checksum = zlib.crc32(source.read_bytes(), checksum)
    return checksum & 0x7FFFFFFF
