"""Would reading the next layer's expert ahead save time? `python benchmarks/lookahead.py --model DIR`.

Decoder steps of one sequence as the engine does them, experts never in memory: a layer's expert is read, in pieces
that are begun as others end, and multiplied with one token; then comes what lies between two layers, products with
matrices of an attention's size. With lookahead the next layer's expert is guessed when the reads of this one have
ended, and read during all that. When the router has spoken, a wrong guess is dropped: pieces that have begun end, no
more are begun. Guesses are right with a given probability; runs of all ways alternate.

Prints ms a token, the median of several runs, ÷ those without lookahead, and the bytes that were read in vain.
The bf16 checkpoint must have experts of 4 MiB or more, as those of `switchrun bench --synthetic`.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import threading
import time
from pathlib import Path

import torch

from switchrun.checkpoint import open_checkpoint
from switchrun.checkpoint.types import ExpertKey
from switchrun.experts.buffers import Buffers
from switchrun.experts.reader import PAGE, FileReader, Segment, Way
from switchrun.experts.ways import known_way

RUNS = 7
TOKENS = 6
#: Four of `inner × d_model` for each of two attentions.
ATTENTION_PRODUCTS = 8


class Read:
    """An expert on its way into a buffer, as many pieces at a time as there are threads."""

    def __init__(self, reader: FileReader, pieces: list[Segment], buffer: memoryview, threads: int) -> None:
        self._reader, self._buffer = reader, buffer
        self._pieces = iter(pieces)
        self._lock = threading.Lock()
        self._flying = 0
        self._ended = threading.Event()
        self.bytes = 0
        for _ in range(threads):
            self._next()

    def _next(self) -> None:
        with self._lock:
            piece = next(self._pieces, None)
            if piece is None:
                if self._flying == 0:
                    self._ended.set()
                return
            self._flying += 1
            self.bytes += piece.length
        self._reader.submit([piece], self._buffer, self._done)

    def _done(self, error: BaseException | None) -> None:
        assert error is None, error
        with self._lock:
            self._flying -= 1
        self._next()

    def drop(self) -> None:
        """Begin no more pieces."""
        with self._lock:
            self._pieces = iter(())
            if self._flying == 0:
                self._ended.set()

    def wait(self) -> None:
        """Block until all pieces have ended."""
        self._ended.wait()


class Decoder:
    """Layers that are nothing but reads and products."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = open_checkpoint(str(folder))
        some, file = next(iter(self.checkpoint.experts.values())), self.checkpoint.experts_file
        self.way = (known_way(file) if file else None) or Way()
        self.reader = FileReader(True, self.way)
        config = self.checkpoint.config
        self.d_model, self.d_ff = config["d_model"], config["d_ff"]
        self.layers = self.checkpoint.sparse_blocks["decoder"]
        self._attention = torch.randn(ATTENTION_PRODUCTS, config["num_heads"] * config["d_kv"], self.d_model).bfloat16()
        size = sum(self._whole_pages(each.offset, each.nbytes)[1] for each in some.ranges) + 4 * PAGE
        # One is computed on, one is being read, and one may still be dropped.
        self.buffers = Buffers(3, -(-size // PAGE) * PAGE)
        self._free = itertools.cycle(range(3))
        for number in range(3):
            self.buffers[number].data[:] = bytes(self.buffers.size)
        self.x = torch.randn(1, self.d_model).bfloat16()

    @staticmethod
    def _whole_pages(offset: int, nbytes: int) -> tuple[int, int]:
        start = offset - offset % PAGE
        return start, -(-(offset + nbytes - start) // PAGE) * PAGE

    def read(self, block: int, expert: int) -> tuple[Read, int]:
        """Start reading an expert; gives the number of its buffer too."""
        number, position, pieces = next(self._free), 0, []
        for each in self.checkpoint.experts[ExpertKey("decoder", block, expert)].ranges:
            start, length = self._whole_pages(each.offset, each.nbytes)
            for begin in range(0, length, self.way.chunk_bytes):
                size = min(self.way.chunk_bytes, length - begin)
                needed = min(size, each.offset + each.nbytes - start - begin)
                pieces.append(Segment(each.file, start + begin, size, position + begin, needed))
            position += length
        return Read(self.reader, pieces, self.buffers[number].data, self.way.threads), number

    def compute(self, number: int) -> None:
        """Multiply with what a buffer holds, then as attention does."""
        wi = self.buffers[number].tensor(0, torch.bfloat16, (self.d_ff, self.d_model))
        torch.nn.functional.linear(torch.relu(torch.nn.functional.linear(self.x, wi)), wi.view(self.d_model, self.d_ff))
        for matrix in self._attention:
            torch.nn.functional.linear(self.x, matrix)

    def generate(self, right: float | None, seed: int) -> tuple[float, int]:
        """Do some tokens; gives the seconds and the bytes read in vain. Without `right` nothing is guessed."""
        chance, experts = random.Random(seed), self.checkpoint.num_experts
        wanted = [(block, chance.randrange(experts)) for _ in range(TOKENS) for block in self.layers]
        guesses = [
            (block, expert if chance.random() < (right or 0.0) else (expert + 1) % experts) for block, expert in wanted
        ]
        dropped = []
        start = time.perf_counter()
        read, number = self.read(*wanted[0])
        for step, following in enumerate(wanted[1:], 1):
            read.wait()
            ahead = None if right is None else self.read(*guesses[step])
            self.compute(number)
            if ahead is not None and guesses[step] == following:
                read, number = ahead
                continue
            if ahead is not None:
                ahead[0].drop()
                dropped.append(ahead[0])
            read, number = self.read(*following)
        read.wait()
        self.compute(number)
        seconds = time.perf_counter() - start
        self.reader.wait()
        return seconds, sum(each.bytes for each in dropped)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--right", type=float, nargs="+", default=[0.0, 0.55, 0.75, 0.9, 1.0])
    options = parser.parse_args()
    with torch.no_grad():
        decoder = Decoder(options.model)
        ways: list[float | None] = [None, *options.right]
        seconds: dict[float | None, list[float]] = {way: [] for way in ways}
        wasted: dict[float | None, list[int]] = {way: [] for way in ways}
        decoder.generate(None, -1)
        for run in range(RUNS):
            for way in ways[run % len(ways) :] + ways[: run % len(ways)]:
                took, vain = decoder.generate(way, run)
                seconds[way].append(took)
                wasted[way].append(vain)
    print(f"{'right':>8}{'ms a token':>12}{'÷ none':>8}{'min':>7}{'max':>7}{'MiB in vain a token':>21}")
    for way in ways:
        ratios = [mine / base for mine, base in zip(seconds[way], seconds[None], strict=True)]
        name = "none" if way is None else f"{way:.0%}"
        wasted_mib = statistics.mean(wasted[way]) / TOKENS / 2**20
        print(
            f"{name:>8}{statistics.median(seconds[way]) / TOKENS * 1e3:12.1f}{statistics.median(ratios):8.3f}"
            f"{min(ratios):7.3f}{max(ratios):7.3f}{wasted_mib:21.0f}"
        )


if __name__ == "__main__":
    main()
