"""Run the examples of README.md and docs/, and write anew the outputs that they show.

    python tools/doc_examples.py            # write
    python tools/doc_examples.py --check    # exit 1 if a page shows anything else than its commands print

Blocks of `sh` are commands. Blocks of `console` are commands behind `$ `, each with what it prints, on stdout and
stderr; a line `…` stands for any lines. Numbers that differ from run to run are not compared, nor is where lines wrap.

A page's commands are run by `sh` in one folder, with a home of their own and nothing of the user's. `switchrun` is this
checkout's; the demo model stands in for the models that the pages name.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in "tutorial eval doctor map scores fine-tuned configuration json".split()),
    *(ROOT / "docs" / f"{name}.md" for name in "performance hub qmoe bench".split()),
]

_BLOCK = re.compile(r"(?<=^```)(sh|console)\n(.*?)(?=^```$)", re.MULTILINE | re.DOTALL)
_STAND_INS = {
    r"google/[\w-]+|ISTA-DASLab/[\w-]+|\bQMOE_DIR\b|\bDIR\b|/tmp/switch-c\b|(?<=-model )(mine|c2048)\b": "demo",
    r"decoder\.0-15": "decoder.0-3",
}
#: What would install something, makes many gigabytes, or takes long; of `doctor` some are enough.
_NOT_RUN = re.compile(
    r"python3 -m venv|source |python benchmarks/|switchrun bench|switchrun eval"
    r"|switchrun doctor .*checkpoint"
)
_FILES = {
    "inputs.txt": "A <extra_id_0> walks into a bar.\nShe opened the <extra_id_0> and looked out of the window.\n",
    "inputs.jsonl": '{"text": "A <extra_id_0> walks into a bar."}\n',
    "questions.csv": "question\nA ___ walks into a bar.\n",
    "passages.txt": "She opened the door and looked out of the window. A man walks into a bar.\n" * 2,
    "dialogues.txt": "Anna: Lunch at one? Ben: Sure, see you there.\n",
}
_VARYING = re.compile(
    r"\d[\d.]*( (ms|s|[KMGT]i?B(/s)?|B|tokens/s|threads)\b|%)"  # times, sizes, rates
    r"|\d+(\.\d+\S*|/s\b)"  # log-probabilities, versions
    r"|\b(avx512|avx2|portable)\b|\bext4\b|\d+(?= ok,)|\d+(?= warning)"
)

_PRELOADED = ROOT / "tools" / "preloaded.py"


class Example(NamedTuple):
    """A command of a page."""

    command: str
    shown: str | None  # None in a block of `sh`


def examples(page: str) -> list[Example]:
    """Give the commands of a page, in order, with what it shows of their outputs."""
    found: list[Example] = []
    for kind, block in _BLOCK.findall(page):
        if kind == "sh":
            found += [Example(line, None) for line in block.replace("\\\n", "").splitlines() if line]
        else:
            parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
            found += [Example(*pair) for pair in zip(parts[1::2], map(str.rstrip, parts[2::2]), strict=True)]
    return found


def runs(example: Example) -> bool:
    """Whether the example can be run here; one with an output always is."""
    if "jq " in example.command and shutil.which("jq") is None:
        return False
    return example.shown is not None or not _NOT_RUN.match(example.command)


def same(shown: str, printed: str) -> bool:
    """Whether a page shows what a command printed, but for what differs from run to run."""
    parts = (re.escape(plain(part)) for part in re.split(r"^…$", shown, flags=re.MULTILINE))
    return re.fullmatch(r" ?.*? ?".join(parts), plain(printed)) is not None


def holds(example: Example, code: int, printed: str) -> bool:
    """Whether a command did what its page says: it printed that, or if nothing is shown it succeeded."""
    return code == 0 if example.shown is None else same(example.shown, printed)


def plain(text: str) -> str:
    """Give a text on one line, without what differs from run to run."""
    return " ".join(_VARYING.sub("#", re.sub("─+", "─", text)).split())


class Runner:
    """Runs lines of `sh` in a folder; close it, or use it in a `with`."""

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        """Start the server, with more environment variables if you like."""
        self._settings = settings or {}
        self._folder = tempfile.TemporaryDirectory()
        self._socket = f"{self._folder.name}/socket"
        switchrun = Path(self._folder.name, "bin", "switchrun")
        switchrun.parent.mkdir()
        switchrun.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {_PRELOADED} ask {self._socket} "$@"\n')
        switchrun.chmod(0o755)
        command = [sys.executable, "-P", str(_PRELOADED), "serve", self._socket]
        environment = self.environment(Path(self._folder.name))
        self._server = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        assert self._server.stdout is not None
        self._server.stdout.readline()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server and delete its folder."""
        self._server.terminate()
        self._server.communicate()
        self._folder.cleanup()

    def page(self, commands: list[str]) -> list[tuple[int, str]]:
        """Run a page's commands one after another, and give their exit codes and what they print.

        Args:
            commands: Lines for one `sh`, which remembers what they `export`.
        """
        with tempfile.TemporaryDirectory() as home:
            folder = Path(home, "work")
            folder.mkdir()
            for name, text in _FILES.items():
                (folder / name).write_text(text, encoding="utf-8")
            self._parquet(folder)
            script = []
            for number, command in enumerate(commands):
                for pattern, stand_in in _STAND_INS.items():
                    command = re.sub(pattern, stand_in, command)
                script.append(f"{{ {command}\n}} > ../{number}.out 2>&1 < /dev/null; echo $? > ../{number}.code")
            subprocess.run(
                ["sh"], input="\n".join(script), text=True, cwd=folder, env=self.environment(Path(home)), check=True
            )
            return [
                (int(Path(home, f"{number}.code").read_text()), self._printed(Path(home, f"{number}.out"), home))
                for number in range(len(commands))
            ]

    def environment(self, home: Path) -> dict[str, str]:
        """Give what a line of `sh` needs, with a home of its own."""
        own = ("SWITCHRUN_", "HF_", "XDG_", "TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
            kept.pop(name, None)
        return kept | {
            "HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{self._folder.name}/bin:{os.environ['PATH']}",
            **self._settings,
        }

    @staticmethod
    def _parquet(folder: Path) -> None:
        with contextlib.suppress(ImportError):
            from pyarrow import parquet, table

            parquet.write_table(table({"text": ["A <extra_id_0> walks into a bar."]}), folder / "inputs.parquet")

    @staticmethod
    def _printed(file: Path, home: str) -> str:
        text = file.read_text(encoding="utf-8").replace(home, "/home/me").replace(str(ROOT), "/home/me/switchrun")
        return text.rstrip()


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is stale")
    check = parser.parse_args().check
    stale = 0
    with Runner() as runner:
        for page in PAGES:
            text = page.read_text(encoding="utf-8")
            todo = [example for example in examples(text) if runs(example)]
            for example, (code, printed) in zip(todo, runner.page([each.command for each in todo]), strict=True):
                if holds(example, code, printed):
                    continue
                stale += 1
                print(f"{page.name}: $ {example.command}\n{printed}\n(exit code {code})\n", file=sys.stderr)
                if example.shown is not None:
                    text = text.replace(f"$ {example.command}\n{example.shown}", f"$ {example.command}\n{printed}")
            if not check:
                page.write_text(text, encoding="utf-8")
    if not check:
        _warn_of_fragile_examples()
    return 1 if stale and check else 0


def _warn_of_fragile_examples() -> None:
    """Say which outputs another CPU may not give: it may round bf16 products otherwise."""
    for settings in ({"SWITCHRUN_DTYPE": "fp32"}, {"OMP_NUM_THREADS": "1"}):
        with Runner(settings) as runner:
            for page in PAGES:
                shown = [each for each in examples(page.read_text(encoding="utf-8")) if each.shown is not None]
                outcomes = runner.page([example.command for example in shown])
                for example, (code, printed) in zip(shown, outcomes, strict=True):
                    if not holds(example, code, printed):
                        print(f"note: with {settings} it answers otherwise: $ {example.command}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
