"""Time of the C kernels: one matrix in every format, on every path, beside torch's bfloat16 linear.

    python benchmarks/native.py [--rows 6144] [--columns 2080] [--tokens 1 8 24] [--threads 1 2]

Random normal weights; the ternary ones of qmoe have 88.5 % zeros. A time is the least of several runs, in milliseconds,
with the weights in memory, not in the cache, as far as the copies that take turns are larger than it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from switchrun.kernels import native, qmoe
from switchrun.kernels.int8 import quantise_int8
from switchrun.kernels.nf4 import quantise_nf4
from switchrun.store.layout import nf4_sizes

Linear = Callable[[torch.Tensor, int], torch.Tensor]


def least_ms(call: Callable[[], object], seconds: float) -> float:
    """Return the least time of a call, in milliseconds, of as many as fit and three at least."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1000


def processor() -> str:
    """Return the processor's name and those of its extensions that matter here."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()]
    return f"{values.get('model name', 'unknown processor')} ({' '.join(flags)})"


def ternary(rows: int, columns: int) -> qmoe.QmoeMatrix:
    """Return a random ternary matrix with 88.5 % zeros."""
    chance = torch.rand(rows, columns)
    digits = (chance > 0.885).to(torch.uint8) + (chance > 0.9425).to(torch.uint8)
    scale = torch.rand(rows, 1) * 0.1
    return qmoe.encode(digits, torch.cat([-scale, scale], 1).flatten().bfloat16())


def formats(rows: int, columns: int, megabytes: float) -> Iterator[tuple[str, Linear]]:
    """Yield each format's name and product; every one has copies of `megabytes` in all, which take turns."""
    weight = torch.randn(rows, columns) * 0.03
    plain = weight.bfloat16()
    codes, scb = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows)
    quantise_int8(weight, codes, scb)
    packed_size, scales = nf4_sizes(rows, columns)
    packed, absmax = torch.empty(packed_size, dtype=torch.uint8), torch.empty(scales)
    quantise_nf4(weight, packed, absmax)
    rounded = absmax.bfloat16()
    sparse = ternary(rows, columns)

    def turns(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        count = max(1, round(megabytes * 1e6 / (tensor.numel() * tensor.element_size())))
        return itertools.cycle([tensor.clone() for _ in range(count)])

    plains = turns(plain)
    yield "torch", lambda x, _threads: torch.nn.functional.linear(x.bfloat16(), next(plains))
    yield "bf16", lambda x, threads: native.linear_bf16(x, next(plains), threads)
    many = turns(codes)
    yield "int8", lambda x, threads: native.linear_int8(x, next(many), scb, threads)
    packs = turns(packed)
    yield "nf4", lambda x, threads: native.linear_nf4(x, next(packs), rounded, (rows, columns), threads)
    words = itertools.cycle(
        qmoe.QmoeMatrix(part, sparse.offsets, sparse.extremes, columns)
        for part in itertools.islice(turns(sparse.codes), max(1, round(megabytes * 5e5 / len(sparse.codes))))
    )
    yield "qmoe", lambda x, threads: native.linear_qmoe(x, next(words), threads)


def main() -> None:
    """Print a row for each format, path and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6144)
    parser.add_argument("--columns", type=int, default=2080)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 24])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--paths", nargs="+", default=list(reversed(native.paths())))
    parser.add_argument("--formats", nargs="+", default=["torch", "bf16", "int8", "nf4", "qmoe"])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each time")
    parser.add_argument("--megabytes", type=float, default=100, help="of copies that take turns")
    given = parser.parse_args()
    torch.manual_seed(0)
    print(f"{processor()}; {given.rows} x {given.columns}, ms")
    print(f"{'':24}" + "".join(f"{tokens:>6} tok" for tokens in given.tokens))
    for name, product in formats(given.rows, given.columns, given.megabytes):
        for path in given.paths if name != "torch" else ["-"]:
            os.environ["SWITCHRUN_KERNELS"] = path if name != "torch" else given.paths[0]
            for threads in given.threads:
                torch.set_num_threads(threads)
                if name not in given.formats:
                    continue
                row = f"{name:6} {path:9} {threads} thread{'s' if threads > 1 else ' '}"
                for tokens in given.tokens:
                    call = partial(product, torch.randn(tokens, given.columns), threads)
                    row += f"{least_ms(call, given.seconds):10.2f}"
                print(row)


if __name__ == "__main__":
    main()
