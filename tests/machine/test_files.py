"""What is opened, and what is refused without waiting."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from switchrun.machine.files import open_regular, read_regular


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 9000)
    (tmp_path / "link").symlink_to("a")
    assert read_regular(tmp_path / "a", 256 * 9000) == bytes(range(256)) * 9000
    assert read_regular(tmp_path / "link", 1 << 30) == bytes(range(256)) * 9000


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "it is a FIFO, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device, not a file"),
        (lambda path: path.mkdir(), "it is a folder, not a file"),
        (_socket, "it is a socket, not a file"),
        (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
        (lambda path: path.symlink_to("a"), "Too many levels of symbolic links"),
    ],
)
def test_what_is_no_file_is_refused(make: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(OSError, match=words):
        open_regular(tmp_path / "a")


def test_a_link_is_not_followed_where_none_may_be(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    (tmp_path / "link").symlink_to("a")
    with pytest.raises(OSError, match="it is a link, not a file"):
        open_regular(tmp_path / "link", os.O_NOFOLLOW)


@pytest.mark.parametrize("size", [101, 20 << 30])
def test_a_file_that_is_too_large_is_not_read(size: int, tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb") as file:
        file.truncate(size)
    with pytest.raises(OSError, match=f"it has {size} bytes, a file of its kind 100 at most"):
        read_regular(tmp_path / "a", 100)
