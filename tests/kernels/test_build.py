"""The build backend: which compilers it takes, and what it does without one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.tags import sys_tags

pytest.importorskip("setuptools", minversion="77")
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


@pytest.mark.parametrize("last", ["portable", "avx2"])
def test_a_compiler_that_fails_half_way_leaves_nothing(
    backend: ModuleType, into: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    monkeypatch.setattr(backend.platform, "machine", lambda: "x86_64")
    script = f"import sys; open(sys.argv[-1], 'w').write('half'); sys.exit({last!r} in sys.argv[-1])"
    assert not backend.compile_kernels([[sys.executable, "-c", script]], into)
    assert list(into.iterdir()) == []


def test_cc_is_asked_first(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", f"{sys.executable} -m ziglang cc")
    assert backend.compilers()[0] == [sys.executable, "-m", "ziglang", "cc"]
    monkeypatch.setenv("CC", "no-such-compiler")
    assert ["no-such-compiler"] not in backend.compilers()
    monkeypatch.setenv("CC", "gcc 'unbalanced")
    assert all(len(command) == 1 or "ziglang" in command for command in backend.compilers())


def test_zig_is_asked_for_only_without_a_compiler(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, into: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    if backend.compilers():
        assert backend.needs_zig() == []
    monkeypatch.setenv("PATH", str(into))
    monkeypatch.setattr(backend, "ZIG", "no_such_zig")  # as where it is not installed yet
    monkeypatch.setattr(backend, "_index_has_zig", lambda: True)
    monkeypatch.setattr(backend.platform, "machine", lambda: "x86_64")
    assert backend.needs_zig() == ["no_such_zig"]
    assert not backend.compile_kernels(backend.compilers(), into)
    monkeypatch.setattr(backend, "_index_has_zig", lambda: False)
    assert backend.needs_zig() == []
    monkeypatch.setattr(backend, "_index_has_zig", lambda: True)
    monkeypatch.setattr(backend.platform, "machine", lambda: "sparc64")
    assert backend.needs_zig() == []  # there is none, and pip would give up
    assert list(into.iterdir()) == []


def test_an_index_without_zig(backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    # Not `find_spec`, by which setuptools warns of distutils.
    if any(importlib.metadata.distributions(name="pip")):
        assert not backend._index_has_zig()
    monkeypatch.setattr(backend.sys, "executable", shutil.which("false"))
    assert backend._index_has_zig()  # another program than pip installs


#: As a frontend calls the hooks; a compiler that takes no time, or none.
BUILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import switchrun_build as backend

def compile_all(commands, folder):
    for path in ("portable", "avx2"):
        (folder / f"_native_{path}.so").write_text("compiled")
    return True

for compile_kernels in (compile_all, lambda *_: False):
    backend.compile_kernels = compile_kernels
    backend.prepare_metadata_for_build_wheel("../metadata")
    print(backend.build_wheel("../wheels"), file=sys.stderr)
"""


def test_a_wheel_is_for_this_platform_and_leaves_the_sources_alone(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "switchrun", sources / "switchrun", ignore=shutil.ignore_patterns("*.so", "*.pyc", "demo"))
    shutil.copytree(ROOT / "build_backend", sources / "build_backend", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    (sources / "switchrun" / "kernels" / "_native_old.so").touch()
    before = sorted(sources.rglob("*"))
    for name in ("metadata", "wheels"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-B", "-c", BUILD, str(sources / "build_backend")]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True, check=True)
    assert sorted(sources.rglob("*")) == before
    found = {}
    for name in [line for line in done.stderr.splitlines() if line.endswith(".whl")]:
        with zipfile.ZipFile(tmp_path / "wheels" / name) as wheel:
            files = {Path(each).name for each in wheel.namelist()}
        assert {"native.py", "native.h", "bf16.c", "page.html"} <= files
        assert name in {f"switchrun-0.1.0-{tag}.whl" for tag in map(str, sys_tags())}, "pip would not install it here"
        found[name.removesuffix(".whl").rpartition("-")[2]] = {each for each in files if each.endswith(".so")}
    here = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert found == {here: {"_native_portable.so", "_native_avx2.so"}, "any": set()}
