r"""What batches save: bytes and seconds an input, one by one, in batches of 8 and 32, and as `auto` makes them.

    python benchmarks/batches.py --model DIR --cpu-memory 6GiB
    python benchmarks/batches.py --model DIR --dtype nf4 --inputs 1=8,8=48,32=192,auto=200

Pipes made-up lines of 6 to 60 words with up to three sentinels into `switchrun fill`, a process for each batch size.
`--inputs` says how many lines each size gets, the first ones of the same 200: one by one takes hours for all of them.
Opening the model is left out. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from switchrun.checkpoint.locate import demo_folder

WORDS = (
    "the a man walks into bar and orders beer with pinch of salt while old woman reads book about rivers that run "
    "through green valley where children play under tall trees until evening comes and lights of small town begin"
).split()


def lines(count: int) -> list[str]:
    """Make so many lines with sentinels, the same ones each time."""
    draw = random.Random(23)
    made = []
    for _ in range(count):
        words = draw.choices(WORDS, k=draw.choice((6, 8, 10, 12, 15, 20, 25, 30, 40, 60)))
        for number, place in enumerate(sorted(draw.sample(range(len(words)), min(3, len(words) // 4)))):
            words[place] = f"<extra_id_{number}>"
        made.append(" ".join(words) + " .")
    return made


@dataclass(frozen=True)
class Row:
    """A line of the table, for one batch size."""

    size: str
    inputs: int
    batches: int
    seconds: float
    nbytes: int
    loads: int
    peak_bytes: int


def measure(options: argparse.Namespace, size: str, texts: list[str]) -> Row:
    """Fill texts in a new process."""
    command = [sys.executable, "-m", "switchrun", "fill", "--format", "jsonl", "--quiet", "--batch-size", size]
    for name in ("model", "dtype", "cpu_memory", "tokenizer", "max_new_tokens", "offload_folder"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, input="\n".join(texts), stdout=subprocess.PIPE, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    # Every input of a batch has the batch's own seconds and bytes.
    batches = {(each["timing"]["total_seconds"], each["experts"]["load_bytes"]): each["experts"] for each in records}
    return Row(
        size,
        len(records),
        len(batches),
        seconds=sum(seconds for seconds, _ in batches),
        nbytes=sum(each["load_bytes"] for each in batches.values()),
        loads=sum(each["loads"] for each in batches.values()),
        peak_bytes=max(each["memory"]["peak_rss_bytes"] for each in records),
    )


def main() -> None:
    """Measure each batch size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--cpu-memory", default="6GiB")
    parser.add_argument("--tokenizer", default=str(demo_folder()))
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--offload-folder", type=Path, default=Path("offload"))
    parser.add_argument("--inputs", default="1=8,8=48,32=192,auto=200")
    options = parser.parse_args()

    print(
        "| batch size | inputs | batches | GB an input | loads an input | s an input | fewer bytes | inputs/s | peak |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    first = None
    for size, count in (word.split("=") for word in options.inputs.split(",")):
        row = measure(options, size, lines(200)[: int(count)])
        seconds, nbytes = row.seconds / row.inputs, row.nbytes / row.inputs
        first = first or (seconds, nbytes)
        print(
            f"| {row.size} | {row.inputs} | {row.batches} | {nbytes / 1e9:.2f} | {row.loads / row.inputs:.1f} "
            f"| {seconds:.2f} | {first[1] / max(1, nbytes):.1f} × | {first[0] / seconds:.1f} × "
            f"| {row.peak_bytes / 2**30:.2f} GiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
