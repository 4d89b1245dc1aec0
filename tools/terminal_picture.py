"""Draw docs/img/terminal.svg, a terminal in which commands of the README were run, or check that it is fresh.

    python tools/terminal_picture.py            # write
    python tools/terminal_picture.py --check    # exit 1 if the commands print anything else, or in other colours

Numbers that differ from run to run are not compared.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from doc_examples import ROOT, Runner, plain
from rich.console import Console
from rich.text import Text

PICTURE = ROOT / "docs" / "img" / "terminal.svg"
COMMANDS = [
    'switchrun fill "They went to the <extra_id_0> and came back in the evening."',
    'switchrun fill --alternatives 2 "She opened the <extra_id_0> and looked out of the window."',
    "switchrun plan --cpu-memory 570MiB | head -12",
]
_COLUMNS = 96


def draw() -> str:
    """Run the commands and return the picture."""
    console = Console(record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True)
    with Runner() as runner, tempfile.TemporaryDirectory() as home:
        for command in COMMANDS:
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            printed = _run(
                command, runner.environment(Path(home)) | {"COLUMNS": str(_COLUMNS), "TERM": "xterm-256color"}
            )
            console.print(Text.from_ansi(printed.replace(str(ROOT), "/home/me/switchrun")), end="\n\n")
    picture = console.export_svg(title="switchrun", unique_id="terminal")
    # Its font would be fetched from the network.
    return re.sub(r"\s*@font-face \{.*?\}", "", picture, flags=re.DOTALL)


def _run(command: str, environment: dict[str, str]) -> str:
    """Give what a command prints on a terminal; progress and notes are left out."""
    ours, terminal = pty.openpty()
    done = subprocess.Popen(
        ["sh", "-c", command],
        env=environment,
        cwd=environment["HOME"],
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=subprocess.DEVNULL,
    )
    os.close(terminal)
    printed = b""
    with contextlib.suppress(OSError):  # which is how a terminal ends
        while data := os.read(ours, 1 << 16):
            printed += data
    os.close(ours)
    if done.wait():
        raise SystemExit(f"exit code {done.returncode}: {command}")
    return printed.decode().replace("\r\n", "\n").rstrip()


def content(picture: str) -> list[tuple[str, str]]:
    """Give the pieces of text in a picture with their styles, without what differs from run to run."""
    styles = dict(re.findall(r"\.terminal-(r\d+) (\{.*?\})", picture))
    pieces = re.findall(r'<text class="terminal-(r\d+)".*?>(.*?)</text>', picture)
    found = [(styles[style], plain(html.unescape(text).replace("\xa0", " "))) for style, text in pieces]
    return [piece for piece in found if piece[1]]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the picture is stale")
    if not parser.parse_args().check:
        PICTURE.write_text(draw(), encoding="utf-8")
        return 0
    if content(PICTURE.read_text(encoding="utf-8")) == content(draw()):
        return 0
    print("docs/img/terminal.svg is stale; run: python tools/terminal_picture.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
