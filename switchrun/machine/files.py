"""Opens files that nobody vouches for: never waits for one, and never reads one without an end."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

#: What a name may lead to that is no file, as people call it.
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}
_CHUNK_BYTES = 1 << 20


def open_regular(path: str | Path, flags: int = 0, *, dir_fd: int | None = None) -> int:
    """Open a regular file for reading and return its descriptor, which is the caller's to close.

    `flags` are added to those of `os.open`, such as `O_NOFOLLOW`. A FIFO, device or socket in its place is neither
    waited for nor read.

    Raises:
        OSError: It cannot be opened, or it is no regular file; `strerror` says which.
    """
    # Looked at first: to open a device can do something. It may be exchanged meanwhile, hence the second look.
    _check(os.stat(path, dir_fd=dir_fd, follow_symlinks=not flags & os.O_NOFOLLOW), path)
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY | flags, dir_fd=dir_fd)
    try:
        _check(os.fstat(file), path)
    except BaseException:
        os.close(file)
        raise
    return file


def read_regular(path: str | Path, most_bytes: int, flags: int = 0, *, dir_fd: int | None = None) -> bytes:
    """Read a whole regular file; errors are those of `open_regular`, and one for a file of more than `most_bytes`."""
    file = open_regular(path, flags, dir_fd=dir_fd)
    try:
        size = os.fstat(file).st_size
        parts: list[bytes] = []
        # The size is not trusted: another process may be writing.
        while size <= most_bytes and (part := os.read(file, _CHUNK_BYTES)):
            parts.append(part)
            size = max(size, sum(map(len, parts)))
    finally:
        os.close(file)
    if size > most_bytes:
        raise OSError(errno.EFBIG, f"it has {size} bytes, a file of its kind {most_bytes} at most", str(path))
    return b"".join(parts)


def system_lines(path: Path) -> list[str]:
    """Return the lines of a file of /proc or /sys; none where there is no such file, or it may not be read.

    The names of files in it are bytes; here they are as `os.listdir` has them.
    """
    try:
        return os.fsdecode(path.read_bytes()).split("\n")
    except OSError:
        return []


def _check(status: os.stat_result, path: str | Path) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        # A link is met only where links are not followed.
        what = "a link" if kind == stat.S_IFLNK else _KINDS.get(kind, "of an unknown kind")
        raise OSError(errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL, f"it is {what}, not a file", str(path))
