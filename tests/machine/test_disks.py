"""What is remembered of a disk belongs to its filesystem, however often that is mounted."""

from __future__ import annotations

from pathlib import Path

import pytest

from switchrun.machine import disks

TABLE = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:40 / /mnt/my\040disk rw - btrfs /dev/sdb1 rw
24 22 0:41 / /mnt/net rw - nfs4 server:/x rw
25 22 0:42 / /mnt/layer rw - overlay overlay rw,upperdir=/var/upper
26 22 0:43 / /mnt/memory rw - tmpfs tmpfs rw
""".strip()


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: TABLE if self.name == "mountinfo" else read_bytes(self))


@pytest.mark.parametrize(
    ("path", "identity"),
    [
        ("/home/a", "ext4 /dev/sda1"),
        ("/mnt/my disk/a", "btrfs /dev/sdb1"),
        ("/mnt/net/a", "nfs4 server:/x"),
        ("/mnt/layer/a", None),
        ("/mnt/memory/a", None),
    ],
)
@pytest.mark.usefixtures("mounts")
def test_what_identifies_a_filesystem(path: str, identity: str | None) -> None:
    assert disks.filesystem_id(Path(path)) == identity


@pytest.mark.usefixtures("mounts")
def test_what_is_measured_is_kept_by_it_or_not_at_all() -> None:
    disks.remember_bandwidth(Path("/mnt/net/a"), 1e9)
    disks.remember_bandwidth(Path("/mnt/layer/a"), 2e9)
    assert disks.known_bandwidth(Path("/mnt/net/other")) == 1e9
    assert disks.known_bandwidth(Path("/mnt/layer/a")) is None
    assert disks.known_bandwidth(Path("/home/a")) is None


def test_room_at_a_link_to_nothing_is_that_beside_it(tmp_path: Path) -> None:
    link = tmp_path / "offload"
    link.symlink_to(tmp_path / "nowhere" / "deep")
    assert disks.free_bytes(link) > 0
    assert disks.free_bytes(link / "below") > 0
