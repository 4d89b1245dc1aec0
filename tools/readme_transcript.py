"""Write the transcript of README.md anew from the live command, or check that it is fresh.

    python tools/readme_transcript.py            # write
    python tools/readme_transcript.py --check    # exit 1 if README.md shows anything else than the command prints

A transcript is a fenced block between the markers; its lines that begin with `$ ` are run by `sh`, one after another,
with `switchrun` being this checkout's, on the demo model, with no settings of the user's.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
_BLOCK = re.compile(r"(?<=<!-- transcript:start -->\n```console\n).*?(?=```\n<!-- transcript:end -->)", re.DOTALL)
_SHELL = 'switchrun() {{ "$SWITCHRUN_PYTHON" -m switchrun "$@"; }}; {command}'


def commands(readme: str) -> list[str]:
    """Give the commands of a README's transcript, without the `$ `."""
    return [line.removeprefix("$ ") for line in _transcript(readme).splitlines() if line.startswith("$ ")]


def shown(readme: str) -> dict[str, str]:
    """Give what a README's transcript shows for each command."""
    parts = re.split(r"^\$ (.*)\n", _transcript(readme), flags=re.MULTILINE)
    return {command: output.rstrip("\n") for command, output in zip(parts[1::2], parts[2::2], strict=True)}


def run(command: str, settings: Mapping[str, str]) -> str:
    """Run one command and give its stdout without the last newline.

    Args:
        command: A line for `sh`; `switchrun` in it is this checkout's.
        settings: Environment variables to add.

    Raises:
        CalledProcessError: The command failed.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SWITCHRUN_")}
    environment |= {"PYTHONPATH": str(ROOT), "SWITCHRUN_PYTHON": sys.executable, **settings}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["sh", "-c", _SHELL.format(command=command)],
            env=environment | {"SWITCHRUN_CACHE": folder},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=300,
        )
    return done.stdout.decode().rstrip("\n")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the transcript is stale")
    check = parser.parse_args().check
    readme = README.read_text(encoding="utf-8")
    outputs = {command: run(command, {}) for command in commands(readme)}
    fresh = "\n".join(f"$ {command}\n{output}\n" for command, output in outputs.items())
    if check:
        stale = [command for command, output in shown(readme).items() if output != outputs[command]]
        for command in stale:
            print(f"README.md is stale: $ {command}\n{outputs[command]}", file=sys.stderr)
        return 1 if stale else 0
    README.write_text(_BLOCK.sub(lambda _: fresh, readme), encoding="utf-8")
    for command, output in outputs.items():
        # Another CPU may round bf16 products otherwise. What does not change with these will hardly change with it.
        for settings in ({"SWITCHRUN_DTYPE": "fp32"}, {"OMP_NUM_THREADS": "1"}):
            if run(command, settings) != output:
                print(
                    f"note: with {settings} it answers otherwise; choose another sentence: $ {command}", file=sys.stderr
                )
    return 0


def _transcript(readme: str) -> str:
    match = _BLOCK.search(readme)
    if match is None:
        raise SystemExit("README.md has no transcript between its markers")
    return match[0]


if __name__ == "__main__":
    sys.exit(main())
