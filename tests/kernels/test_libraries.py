"""Which path is used, and which libraries are not: those of other sources, and what is no library."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from switchrun.errors import UsageError
from switchrun.kernels import libraries
from tests.conftest import RunSwitchrun

KERNELS = Path(libraries.__file__).parent


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Libraries are looked for again, now and after the test."""
    libraries.library.cache_clear()
    libraries._sources.cache_clear()
    yield
    libraries.library.cache_clear()
    libraries._sources.cache_clear()


@pytest.fixture
def elsewhere(tmp_path: Path, forgotten: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what is built, and of its sources."""
    folder = tmp_path / "kernels"
    shutil.copytree(KERNELS, folder, ignore=shutil.ignore_patterns("*.py*", "__pycache__"))
    monkeypatch.setattr(libraries, "_FOLDER", folder)
    return folder


def test_what_is_built_is_of_these_sources() -> None:
    assert not libraries.unusable(), "run: python build_backend/switchrun_build.py"


@pytest.mark.skipif(not libraries.paths(), reason="built without kernels")
def test_libraries_of_other_sources_are_not_used(elsewhere: Path) -> None:
    assert libraries.paths()
    libraries.library.cache_clear()
    libraries._sources.cache_clear()
    (elsewhere / "c" / "bf16.c").write_bytes(b"\n" + (elsewhere / "c" / "bf16.c").read_bytes())
    assert (libraries.paths(), libraries.path(), libraries.unusable()) == ((), None, True)


def test_what_is_no_library_is_not_used(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in libraries.PATHS:
        (elsewhere / f"_native_{path}.so").unlink(missing_ok=True)
    assert (libraries.paths(), libraries.path(), libraries.unusable()) == ((), None, False)
    (elsewhere / "_native_portable.so").write_bytes(b"junk")
    libraries.library.cache_clear()
    assert (libraries.paths(), libraries.unusable()) == ((), True)
    monkeypatch.setenv("SWITCHRUN_KERNELS", "portable")
    with pytest.raises(UsageError, match="does not have") as raised:
        libraries.path()
    assert raised.value.hint == "no kernels are built: see switchrun doctor, or unset it"


@pytest.mark.parametrize("words", ["fill A<extra_id_0>b", "prepare --dtype int8", "bench --repeats 1"])
def test_a_path_that_is_not_here(words: str, run_switchrun: RunSwitchrun) -> None:
    done = run_switchrun(words.split(), env={"SWITCHRUN_KERNELS": "mmx"})
    assert done.returncode == 2
    said = " ".join((done.stderr + done.stdout).split())
    assert "SWITCHRUN_KERNELS is 'mmx', which this machine does not have (" in said
    assert "Traceback" not in said
