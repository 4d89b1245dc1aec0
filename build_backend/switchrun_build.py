"""Builds the package with setuptools, and its C kernels with whatever compiler there is.

pip takes this for the build backend (PEP 517, `backend-path` in pyproject.toml). The kernels are shared libraries
without Python's ABI, one for each path of a processor, and lie beside `switchrun/kernels/native.py`. Without a compiler
pip installs `ziglang`, which brings one, for the build alone. If nothing compiles, the package is installed without
kernels and multiplies by way of torch.

Run it as a script to compile in place: `python build_backend/switchrun_build.py [more flags for the compiler]`.
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
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 - hooks that are setuptools' own
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

KERNELS = Path(__file__).resolve().parent.parent / "switchrun" / "kernels"
FLAGS = ["-std=gnu11", "-O3", "-s", "-shared", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
#: What a path's code may use, in the words of gcc and clang, and of zig, which else builds for this very processor.
X86_PATHS = {
    "portable": ([], "baseline"),
    "avx2": (["-mavx2", "-mfma"], "x86_64_v3"),
    "avx512": (["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"], "x86_64_v4"),
}
#: Machines that PyPI has `ziglang` for, whatever the system.
ZIG_MACHINES = ("x86_64", "amd64", "aarch64", "arm64")
OTHER_PATHS: dict[str, tuple[list[str], str]] = {"portable": ([], "baseline")}


def compilers() -> list[list[str]]:
    """Return the commands of the C compilers on PATH, $CC first."""
    named = shlex.split(os.environ.get("CC", ""))
    commands = [*([named] if named else []), ["cc"], ["gcc"], ["clang"]]
    return [command for command in commands if shutil.which(command[0])]


def compile_kernels(commands: list[list[str]], into: Path, more: tuple[str, ...] = ()) -> bool:
    """Compile the library of each path with the first command that can; all of them, or none and False."""
    paths = X86_PATHS if platform.machine().lower() in ("x86_64", "amd64") else OTHER_PATHS
    sources = sorted(str(source) for source in (KERNELS / "c").glob("*.c"))
    for command in commands:
        zig = "ziglang" in command
        with tempfile.TemporaryDirectory(dir=into) as folder:
            for path, (flags, zig_cpu) in paths.items():
                target = [f"-mcpu={zig_cpu}"] if zig else flags
                library = Path(folder, f"_native_{path}.so")
                call = [*command, *FLAGS, *target, *more, *sources, "-o", str(library)]
                result = subprocess.run(call, capture_output=True, text=True, check=False)
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
        return [] if compile_kernels(compilers(), Path(folder)) else ["ziglang"]


def _build_in_place() -> bool:
    for left in KERNELS.glob("_native_*.so"):
        left.unlink()
    shutil.rmtree(KERNELS.parent.parent / "build" / "lib", ignore_errors=True)  # setuptools packs what it left there
    zig = [[sys.executable, "-m", "ziglang", "cc"]] if importlib.util.find_spec("ziglang") else []
    built = compile_kernels(compilers() + zig, KERNELS)
    if not built:
        print("no C compiler works: switchrun is installed without its kernels", file=sys.stderr)
    return built


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return what building needs besides setuptools: zig where no C compiler works."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *needs_zig()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Return what building needs besides setuptools: zig where no C compiler works."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *needs_zig()]


def build_wheel(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Build a wheel for this platform and any Python, or for any platform if it has no kernels."""
    settings = dict(config_settings or {})
    if _build_in_place():
        platform_name = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        given = settings.get("--build-option", [])
        options = [given] if isinstance(given, str) else list(given)
        settings["--build-option"] = [*options, f"--plat-name={platform_name}"]
    return str(build_meta.build_wheel(wheel_directory, settings, metadata_directory))


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    """Compile in place, and build the wheel that points to this folder."""
    _build_in_place()
    return str(build_meta.build_editable(wheel_directory, config_settings, metadata_directory))


if __name__ == "__main__":
    sys.exit(not compile_kernels(compilers(), KERNELS, tuple(sys.argv[1:])))
