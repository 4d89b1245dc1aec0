"""Control groups of both versions, on folders that look like them."""

from __future__ import annotations

from pathlib import Path

import memory_group
import pytest
from memory_group import MemoryGroup

V1, V2 = "memory.limit_in_bytes", "memory.max"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every new group the files that the kernel would put there."""
    real = Path.mkdir

    def mkdir(self, *args, **options):
        real(self, *args, **options)
        if self.name.startswith("switchrun-bench"):
            for name in ("cgroup.procs", V1 if "memory" in self.parts else V2):
                (self / name).write_text("")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(
        memory_group, "_remove", lambda folder: [each.unlink() for each in folder.iterdir()] + [folder.rmdir()]
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "cgroup"
    (root / "memory" / "own" / "inner").mkdir(parents=True)
    (root / "slice" / "scope").mkdir(parents=True)
    (root / "cgroup.controllers").write_text("memory")
    return root


@pytest.mark.parametrize(
    ("lines", "parent", "limit_file"),
    [
        ("4:memory:/own/inner\n0::/\n", "memory/own/inner", V1),
        ("4:cpu:/\n4:memory:/of/the/host\n", "memory", V1),
        ("0::/slice/scope\n", "slice/scope", V2),
    ],
)
def test_a_group_is_made_and_removed(
    tree: Path, tmp_path: Path, kernel: None, lines: str, parent: str, limit_file: str
) -> None:
    membership = tmp_path / "membership"
    membership.write_text(lines)
    with MemoryGroup(12345, tree, membership) as group:
        (folder,) = (tree / parent).glob("switchrun-bench-*")
        assert (folder / limit_file).read_text() == "12345"
        group.add(77)
        assert (folder / "cgroup.procs").read_text() == "77"
    assert not list((tree / parent).glob("switchrun-bench-*"))


def test_without_a_controller_it_is_said_so(tree: Path, tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    # Version 2 without `kernel`: the limit's file is missing, as where the controller is not handed down.
    membership.write_text("0::/slice/scope\n")
    with pytest.raises(OSError, match="no control group can be made here"):
        MemoryGroup(1, tree, membership)
    assert not list(tree.rglob("switchrun-bench-*"))
    membership.write_text("1:cpu:/\n")
    with pytest.raises(OSError, match="there is no memory controller"):
        MemoryGroup(1, tree, membership)
