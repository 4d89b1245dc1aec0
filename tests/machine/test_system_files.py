"""What /proc and /sys say is bytes, in any shape, or is not there at all."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from switchrun.bench import raw_disk, runner
from switchrun.machine import disks, processor, ram
from switchrun.machine.files import system_lines
from switchrun.units import MIB

MOUNTS = rb"""22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
no line at all
23 22 0:40 / /mnt/caf%s rw - xfs /dev/sdb1 rw
24 22 0:41 / /mnt/%s rw - btrfs /dev/sdc1 rw
25 22 0:42 / /mnt/line\012tab\011back\134slash rw - nfs4 server:/a\040b rw
26 22 0:43 / /mnt/octal\351 rw - fuse.sshfs host: rw
27 22 0:44 / /mnt/half rw -
28 22 0:45 / /mnt/ff%s rw - tmpfs none rw
"""

Say = Callable[[str, bytes | None], None]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """A function that sets what a file holds; None is that it may not be read."""
    said: dict[str, bytes | None] = {}
    real = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        data = said.get(str(path), b"") if str(path) in said else real(path)
        if data is None:
            raise PermissionError(13, "no", str(path))
        return data

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    return said.__setitem__


def test_mounts_whose_names_are_not_ascii_or_not_utf8(say: Say) -> None:
    say("/proc/self/mountinfo", MOUNTS % (b"\xe9", "größe".encode(), b"\x0c\x1c\xe2\x80\xa8"))
    assert disks.filesystem_of(Path(os.fsdecode(b"/mnt/caf\xe9/a"))) == "xfs"
    assert disks.filesystem_of(Path("/mnt/größe/a")) == "btrfs"
    assert disks.filesystem_id(Path("/mnt/line\ntab\tback\\slash/a")) == "nfs4 server:/a b"
    assert disks.filesystem_of(Path(os.fsdecode(b"/mnt/octal\xe9/a"))) == "fuse.sshfs"
    assert disks.filesystem_of(Path("/mnt/ff\x0c\x1c\u2028/a")) == "tmpfs"
    assert disks.filesystem_of(Path("/mnt/half/a")) == "ext4"


def test_a_bandwidth_is_kept_for_such_a_mount(say: Say) -> None:
    say("/proc/self/mountinfo", b"22 1 8:1 / / rw - nfs4 \xe9:/x rw\n")
    disks.remember_bandwidth(Path("/somewhere"), 1e9)
    assert disks.known_bandwidth(Path("/somewhere/else")) == 1e9


@pytest.mark.parametrize("junk", [None, b"", b"\n\n", b"\xff\xfe\n - \n", b": - :\n::\n:::\n0::\n", b"1 2 3 4 5 - \n"])
def test_junk_is_unknown(say: Say, junk: bytes | None) -> None:
    processor.has_bf16_instructions.cache_clear()
    for name in ("mountinfo", "cgroup", "status", "stat", "io"):
        say(f"/proc/self/{name}", junk)
    say("/proc/cpuinfo", junk)
    assert disks.filesystem_of(Path("/")) in (None, "")
    assert ram.memory_limits() in ([], ram.memory_limits())
    assert ram.peak_rss_bytes() > MIB
    assert processor.process_age_seconds() == 0
    assert not processor.has_bf16_instructions()
    assert raw_disk.io_read_bytes() is None
    assert runner.describe_environment(Path("/"))["cpu"]
    processor.has_bf16_instructions.cache_clear()


def test_a_control_group_may_have_any_name(tmp_path: Path, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "_CGROUP", tmp_path)
    group = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9:b"))
    group.mkdir()
    (group / "memory.max").write_text("1000\n")
    (group / "memory.current").write_text("600\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 100\n")
    say("/proc/self/cgroup", b"junk\n1:cpu:/x\n0::/caf\xe9:b\n")
    assert ram.memory_limits() == [(1000, 500)]
    (group / "memory.max").write_text("many\n")
    assert ram.memory_limits() == []


@pytest.fixture
def odd_name() -> Iterator[None]:
    """This process is called as no text is, as one that was started through a link may be."""
    libc, before = ctypes.CDLL(None), Path("/proc/self/comm").read_bytes().strip()
    libc.prctl(15, b"\xe9) 1 (\n", 0, 0, 0)
    yield
    libc.prctl(15, before, 0, 0, 0)


@pytest.mark.usefixtures("odd_name")
def test_a_process_may_have_any_name() -> None:
    assert b"\xe9" in Path("/proc/self/stat").read_bytes()
    assert ram.peak_rss_bytes() > MIB
    assert 0 < processor.process_age_seconds() < 10**6


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise FileNotFoundError(2, "/proc/meminfo")

    monkeypatch.setattr(psutil, "virtual_memory", missing)
    monkeypatch.setattr(psutil, "Process", lambda: (_ for _ in ()).throw(psutil.NoSuchProcess(1)).__next__())
    assert 0 < ram.available_memory_bytes() <= ram.total_memory_bytes()
    assert ram.rss_bytes() > MIB
    assert system_lines(Path("/proc/nothing/here")) == []
