"""Write the transcripts of README.md and docs/bench.md anew from the live commands, or check that they are fresh.

    python tools/readme_transcript.py            # write
    python tools/readme_transcript.py --check    # exit 1 if a page shows anything else than the command prints

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
#: Its figures differ from run to run, so that only its words are compared.
BENCH = ROOT / "docs" / "bench.md"
_BLOCK = re.compile(r"(?<=<!-- transcript:start -->\n```console\n).*?(?=```\n<!-- transcript:end -->)", re.DOTALL)
_SHELL = 'switchrun() {{ "$SWITCHRUN_PYTHON" -m switchrun "$@"; }}; {command}'


def commands(page: str) -> list[str]:
    """Give the commands of a page's transcript, without the `$ `."""
    return [line.removeprefix("$ ") for line in _transcript(page).splitlines() if line.startswith("$ ")]


def shown(page: str) -> dict[str, str]:
    """Give what a page's transcript shows for each command."""
    parts = re.split(r"^\$ (.*)\n", _transcript(page), flags=re.MULTILINE)
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


def words(output: str) -> list[str]:
    """Give what an output says without figures: what begins its lines. Notes and the last sentence may differ."""
    lines = [re.sub("─+", "─", line.split("  ")[0]) for line in output.splitlines()[:-1]]
    return [line for line in lines if line != "note"]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a transcript is stale")
    check = parser.parse_args().check
    stale = False
    for path in (README, BENCH):
        page = path.read_text(encoding="utf-8")
        outputs = {command: run(command, {}) for command in commands(page)}
        if not check:
            fresh = "\n".join(f"$ {command}\n{output}\n" for command, output in outputs.items())
            path.write_text(page.replace(_transcript(page), fresh), encoding="utf-8")
            continue
        for command, output in shown(page).items():
            if words(output) != words(outputs[command]) or (path == README and output != outputs[command]):
                print(f"{path.name} is stale: $ {command}\n{outputs[command]}", file=sys.stderr)
                stale = True
    return int(stale) if check else _note_what_may_differ()


def _note_what_may_differ() -> int:
    """Say which answers of README.md another processor may round otherwise."""
    for command, output in shown(README.read_text(encoding="utf-8")).items():
        # What does not change with these will hardly change with it.
        for settings in ({"SWITCHRUN_DTYPE": "fp32"}, {"OMP_NUM_THREADS": "1"}):
            if run(command, settings) != output:
                print(
                    f"note: with {settings} it answers otherwise; choose another sentence: $ {command}", file=sys.stderr
                )
    return 0


def _transcript(page: str) -> str:
    match = _BLOCK.search(page)
    if match is None:
        raise SystemExit("a page has no transcript between its markers")
    return match[0]


if __name__ == "__main__":
    sys.exit(main())
