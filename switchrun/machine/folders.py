"""Where switchrun may write: the offload folder, and the user's cache folder; and how, without following links."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from switchrun.machine.files import read_regular

_MODEL = re.compile(r"(?:[A-Za-z0-9._-]+-)?[0-9a-f]{12}", re.ASCII)
DTYPE_NAME = re.compile(r"[a-z0-9]+", re.ASCII)
#: What lies in a folder of experts of a model and dtype, and says so.
MANIFEST = "manifest.json"
#: The folder of parsed indexes, one for each checkpoint.
_INDEX_FOLDER = "index"
_INDEX = re.compile(r"[0-9a-f]{32}\.json", re.ASCII)
_MOST_README_BYTES = 1 << 20
#: The cache folder of who has no home: nobody can ever make it, so nothing is found there and nothing kept.
NOWHERE = Path(os.devnull) / "no-home-folder"


@contextmanager
def open_below(root: str | Path, *names: str, make: bool = False) -> Iterator[int]:
    """Open a folder by its name in a folder in … in `root`, for calls with `dir_fd`; with `make`, make what is missing.

    `root` may be a link, for the user has named it. What is below is switchrun's own, and a link there is not followed:
    it could lead what is written or deleted to anywhere. Since calls are made relative to the open folder, it does not
    matter who puts a link in its place meanwhile.

    Raises:
        OSError: A folder is not there, or is a link; `strerror` names it.
    """
    if make:
        Path(root).mkdir(parents=True, exist_ok=True)
    handle = _open_folder(root)
    try:
        for name in names:
            outer, handle = handle, _open_in(handle, name, make)
            os.close(outer)
        yield handle
    finally:
        os.close(handle)


def _open_in(outer: int, name: str, make: bool) -> int:
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=outer)
    try:
        return _open_folder(name, os.O_NOFOLLOW, dir_fd=outer)
    except OSError:
        if _is_link(name, outer):
            raise NotADirectoryError(errno.ENOTDIR, f"{name} is a link, and links are not followed there") from None
        raise


def _open_folder(path: str | Path, flags: int = 0, dir_fd: int | None = None) -> int:
    flags |= os.O_DIRECTORY | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDONLY | flags, dir_fd=dir_fd)
    except PermissionError:  # what may not be listed may still be passed through
        return os.open(path, os.O_PATH | flags, dir_fd=dir_fd)


def _is_link(name: str, folder: int) -> bool:
    try:
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except OSError:
        return False


def _names_below(root: Path, *names: str, folders: bool = False) -> list[str]:
    """Return what a folder holds, all or the folders; nothing if it is not there, or may not be looked at."""
    with contextlib.suppress(OSError), open_below(root, *names) as handle, os.scandir(handle) as entries:
        return sorted(each.name for each in entries if not folders or each.is_dir(follow_symlinks=False))
    return []


def cache_folder() -> Path:
    """Return the folder for what switchrun may remember: `SWITCHRUN_CACHE`, else `switchrun` in the user's cache."""
    override = os.environ.get("SWITCHRUN_CACHE")
    if override:
        return Path(override)
    for folder in (Path(os.environ.get("XDG_CACHE_HOME", "")), in_home("~/.cache")):
        if folder.is_absolute():  # by XDG's rules a relative one counts as unset
            return folder / "switchrun"
    return NOWHERE


def in_home(path: str | Path) -> Path:
    """Return a path with the home folder in the place of `~`; unchanged if there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def write_cache_file(file: Path, data: bytes) -> None:
    """Write a file that may be lost, whole or not at all; a cache that cannot be written is no reason to fail."""
    # Two processes may write the same file at once, and nobody else shall know the name.
    temporary = f".{secrets.token_hex(8)}.tmp"
    with contextlib.suppress(OSError), _folder_of(file, make=True) as folder:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder)
        try:
            with open(handle, "wb") as output:
                output.write(data)
            os.replace(temporary, file.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise


def read_cache_file(file: Path, most_bytes: int) -> bytes:
    """Read what `write_cache_file` wrote; OSError if it is not there, is a link, no file, or too large to be that."""
    with _folder_of(file) as folder:
        return read_regular(file.name, most_bytes, os.O_NOFOLLOW, dir_fd=folder)


def _folder_of(file: Path, make: bool = False) -> AbstractContextManager[int]:
    # The cache folder may be a link of the user's; the folder of indexes in it, or in the offload folder, may not.
    root, name = file.parent.parent, file.parent.name
    return open_below(root, name, make=make) if name == _INDEX_FOLDER else open_below(file.parent, make=make)


def offload_folder(given: str | Path | None) -> Path:
    """Return the folder for the disk tier that switchrun writes, and for parsed indexes.

    Unless one is given, it is `offload/` in the current folder, if that is there and switchrun's own or empty; else it
    is a folder in the user's cache.
    """
    if given is not None:
        return Path(given)
    here = Path("offload")
    return here if _is_ours(here) else cache_folder() / "offload"


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty, or what is in it shows that switchrun writes there."""
    try:
        if next(folder.iterdir(), None) is None:
            return True
    except OSError:  # it is not there, no folder, or may not be looked at
        return False
    with contextlib.suppress(OSError):
        if b"switchrun" in read_regular(folder / "README.md", _MOST_README_BYTES):
            return True
    return bool(store_folders(folder)) or any(map(_INDEX.fullmatch, _names_below(folder, _INDEX_FOLDER)))


def store_folders(offload: Path) -> list[Path]:
    """Return the folders in an offload folder that experts of a model and dtype are kept in, none behind a link.

    Others have files called manifest.json too, and an offload folder may be any folder of the user's.
    """
    return [
        offload / model / dtype
        for model in filter(_MODEL.fullmatch, _names_below(offload, folders=True))
        for dtype in filter(DTYPE_NAME.fullmatch, _names_below(offload, model, folders=True))
        if MANIFEST in _names_below(offload, model, dtype)
    ]
