"""The build backend: which compilers it takes, and what it does without one."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("setuptools")
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("switchrun_build", ROOT / "build_backend" / "switchrun_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def into(tmp_path: Path) -> Path:
    folder = tmp_path / "kernels"
    folder.mkdir()
    return folder


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
def test_compilers_take_turns_until_one_works(backend: ModuleType, into: Path) -> None:
    broken = [sys.executable, "-c", "raise SystemExit(1)"]
    assert backend.compile_kernels([broken, *backend.compilers()], into)
    made = {path.name for path in into.iterdir()}
    assert "_native_portable.so" in made
    assert made <= {"_native_portable.so", "_native_avx2.so", "_native_avx512.so"}
    assert not backend.compile_kernels([broken], into)
    assert {path.name for path in into.iterdir()} == made  # those that were there are left


def test_cc_is_asked_first(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{sys.executable} -m ziglang cc")
    assert backend.compilers()[0] == [sys.executable, "-m", "ziglang", "cc"]
    monkeypatch.setenv("CC", "no-such-compiler")
    assert ["no-such-compiler"] not in backend.compilers()


def test_zig_is_asked_for_only_without_a_compiler(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, into: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    if backend.compilers():
        assert backend.needs_zig() == []
    monkeypatch.setenv("PATH", str(into))
    monkeypatch.setattr(backend.platform, "machine", lambda: "x86_64")
    assert backend.needs_zig() == ["ziglang"]
    assert not backend.compile_kernels(backend.compilers(), into)
    monkeypatch.setattr(backend.platform, "machine", lambda: "sparc64")
    assert backend.needs_zig() == []  # there is none, and pip would give up
    assert list(into.iterdir()) == []
