"""Builds the package with setuptools, and its C kernels with whatever compiler there is.

pip takes this for the build backend (PEP 517, `backend-path` in pyproject.toml). The kernels are shared libraries
without Python's ABI, one for each path of a processor, and lie beside `switchrun/kernels/native.py`. Without a compiler
pip installs `ziglang`, which brings one, for the build alone. If nothing compiles, the package is installed without
kernels and multiplies by way of torch; `switchrun doctor` says so.

Run it as a script to compile in place: `python build_backend/switchrun_build.py [flags for the compiler]`.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 - hooks that are setuptools' own
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
)

ROOT = Path(__file__).resolve().parent.parent
KERNELS = Path("switchrun", "kernels")
#: What a wheel is made of.
PARTS = ("pyproject.toml", "README.md", "LICENSE", "switchrun/**/*")
FLAGS = ["-std=gnu11", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
STRIP = ("-s",)
#: What a path's code may use, in the words of gcc and clang, and of zig, which else builds for this very processor.
X86_PATHS = {
    "portable": ([], "baseline"),
    "avx2": (["-mavx2", "-mfma"], "x86_64_v3"),
    "avx512": (["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"], "x86_64_v4"),
}
OTHER_PATHS: dict[str, tuple[list[str], str]] = {"portable": ([], "baseline")}
#: Machines that PyPI has `ziglang` for, whatever the system.
ZIG_MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
ZIG = "ziglang"


def compilers() -> list[list[str]]:
    """Return the commands of the C compilers that are here: $CC first, zig last."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quote without its other one
        named = []
    commands = [*([named] if named else []), ["cc"], ["gcc"], ["clang"]]
    zig = [[sys.executable, "-m", ZIG, "cc"]] if importlib.util.find_spec(ZIG) else []
    return [command for command in commands if shutil.which(command[0])] + zig


def compile_kernels(commands: list[list[str]], into: Path, more: tuple[str, ...] = STRIP) -> bool:
    """Compile the library of each path with the first command that can; all of them, or none and False."""
    paths = X86_PATHS if platform.machine().lower() in ("x86_64", "amd64") else OTHER_PATHS
    sources = sorted((ROOT / KERNELS / "c").glob("*.[ch]"))
    checksum = 0
    for source in sources:  # as in switchrun/kernels/libraries.py, which takes no library of other sources
        checksum = zlib.crc32(source.read_bytes(), checksum)
    files = [str(source) for source in sources if source.suffix == ".c"]
    for command in commands:
        with tempfile.TemporaryDirectory(dir=into, prefix=".compiling-") as folder:
            for path, (flags, zig_cpu) in paths.items():
                target = [f"-mcpu={zig_cpu}"] if ZIG in command else flags
                library = Path(folder, f"_native_{path}.so")
                stamp = f"-DSOURCES={checksum & 0x7FFFFFFF}"
                call = [*command, *FLAGS, *target, *more, stamp, *files, "-o", str(library)]
                result = subprocess.run(
                    call, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
                )
                if result.returncode or not library.exists():
                    print(f"{shlex.join(call)}\n{result.stderr}", file=sys.stderr)
                    break
            else:
                for path in paths:  # renamed, never written over: a running process may have the old ones open
                    Path(folder, f"_native_{path}.so").replace(into / f"_native_{path}.so")
                return True
    return False


def needs_zig() -> list[str]:
    """Return what else must be installed to compile: zig, if no compiler works here and there is one to install.

    pip gives up where it cannot install what a build asks for.
    """
    if platform.machine().lower() not in ZIG_MACHINES:
        return []
    with tempfile.TemporaryDirectory() as folder:
        works = compile_kernels(compilers(), Path(folder))
    return [] if works or not _index_has_zig() else [ZIG]


def _index_has_zig() -> bool:
    """Return whether pip finds zig, by the user's own settings; True where another program than pip installs."""
    # -I: without the paths of the build's environment, in which there is no pip.
    pip = [sys.executable, "-I", "-m", "pip"]
    if subprocess.run([*pip, "--version"], stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
        return True
    call = [*pip, "index", "versions", "--retries", "1", ZIG]
    return subprocess.run(call, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0


def _compile(into: Path) -> bool:
    built = compile_kernels(compilers(), into)
    if not built:
        print("no C compiler works: switchrun is installed without its kernels, and is slow", file=sys.stderr)
    return built


@contextmanager
def _copy() -> Iterator[Path]:
    """Work in a copy of the sources: setuptools leaves what it makes, and two builds may run at once."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for source in (file for part in PARTS for file in ROOT.glob(part)):
            if source.is_file() and source.suffix not in (".so", ".pyc"):
                copy = folder / source.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)  # without its rights: the sources may be read-only
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(here)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return what building needs besides setuptools: zig where no C compiler works."""
    with _copy():
        return [*build_meta.get_requires_for_build_wheel(config_settings), *needs_zig()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Return what building needs besides setuptools: zig where no C compiler works."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *needs_zig()]


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Any = None) -> str:
    """Write the wheel's metadata."""
    into = str(Path(metadata_directory).resolve())
    with _copy():
        return str(build_meta.prepare_metadata_for_build_wheel(into, config_settings))


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Build a wheel for this platform and any Python, or for any platform if it has no kernels."""
    into = str(Path(wheel_directory).resolve())
    metadata = metadata_directory and str(Path(metadata_directory).resolve())
    settings = dict(config_settings or {})
    with _copy() as folder:
        if _compile(folder / KERNELS):
            platform_name = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            given = settings.get("--build-option", [])
            options = [given] if isinstance(given, str) else list(given)
            settings["--build-option"] = [*options, f"--plat-name={platform_name}"]
        return str(build_meta.build_wheel(into, settings, metadata))


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Compile in place, and build the wheel that points to this folder."""
    _compile(ROOT / KERNELS)
    return str(build_meta.build_editable(wheel_directory, config_settings, metadata_directory))


if __name__ == "__main__":
    sys.exit(not compile_kernels(compilers(), ROOT / KERNELS, tuple(sys.argv[1:]) or STRIP))
