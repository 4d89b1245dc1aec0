"""Time of a product in bf16, int8, nf4 and qmoe: torch, bitsandbytes and ours, one matrix, several numbers of rows.

    python benchmarks/quantised.py [--rows 6144] [--columns 2080] [--tokens 1 8 24 128] [--threads 2] [--paths avx2]

Random normal weights; the ternary ones of qmoe have 88.5 % zeros. `x` is bfloat16. A time is the least of several runs,
in milliseconds. Copies take turns, so that weights come from memory and not from the processor's cache.
`ONEDNN_MAX_CPU_ISA=AVX512_CORE` in the environment has torch multiply as on a processor without bf16 instructions.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import bitsandbytes.functional as bnb
import torch

from switchrun.kernels import native, qmoe
from switchrun.kernels.int8 import linear_int8, quantise_int8
from switchrun.kernels.nf4 import NF4_VALUES, linear_nf4, quantise_nf4
from switchrun.kernels.plain import linear
from switchrun.store.layout import NF4_BLOCK, nf4_sizes

Product = Callable[[torch.Tensor], torch.Tensor]


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


class Matrix:
    """One matrix in every form, and the ways to multiply with it; `megabytes` of copies of each take turns."""

    def __init__(self, rows: int, columns: int, megabytes: float) -> None:
        self._megabytes = megabytes
        self.shape = (rows, columns)
        self.weight = torch.randn(rows, columns).mul_(0.03).bfloat16()
        self.codes, self.scb = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows)
        codes, scales = nf4_sizes(rows, columns)
        self.packed, self.absmax = torch.empty(codes, dtype=torch.uint8), torch.empty(scales)
        self.quantise_int8()
        self.quantise_nf4()

    def quantise_int8(self) -> None:
        """Ours."""
        quantise_int8(self.weight, self.codes, self.scb)

    def quantise_nf4(self) -> None:
        """Ours."""
        quantise_nf4(self.weight, self.packed, self.absmax)

    def quantise_int8_bitsandbytes(self) -> None:
        """Theirs."""
        bnb.int8_vectorwise_quant(self.weight)

    def quantise_nf4_bitsandbytes(self) -> None:
        """Theirs."""
        bnb.quantize_4bit(self.weight, blocksize=NF4_BLOCK, quant_type="nf4")

    def _turns(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        count = max(1, round(self._megabytes * 1e6 / (tensor.numel() * tensor.element_size())))
        return itertools.cycle([tensor.clone() for _ in range(count)]).__next__

    def others(self) -> Iterator[tuple[str, str, Product]]:
        """Yield format, way and product of torch and bitsandbytes."""
        weight = self._turns(self.weight)
        yield "bf16", "torch", lambda x: torch.nn.functional.linear(x, weight())
        codes, scales = self._turns(self.codes), (self.scb / 127).bfloat16()
        yield "int8", "torch", lambda x: torch.ops.aten._weight_int8pack_mm(x, codes(), scales)
        yield "int8", "bitsandbytes", lambda x: self._llm_int8(x, codes())
        packed, wide = self._tiles()
        yield "nf4", "bitsandbytes", lambda x: self._gemv(x, packed(), wide)

    def _llm_int8(self, x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        x_codes, stats, outliers = bnb.int8_vectorwise_quant(x.half(), threshold=6.0)
        operation = torch.ops.bitsandbytes.int8_mixed_scaled_mm
        result: torch.Tensor = operation(x, x_codes, codes, stats, self.scb, outliers)[0]
        return result

    def _tiles(self) -> tuple[Callable[[], torch.Tensor], tuple[torch.Tensor, int]]:
        """In the order of bitsandbytes' product on CPUs, with rows filled up to whole blocks, which it needs."""
        filled = torch.nn.functional.pad(self.weight, (0, -self.shape[1] % NF4_BLOCK))
        quantised = bnb.quantize_4bit(filled, blocksize=NF4_BLOCK, quant_type="nf4")
        tiles, state = bnb._convert_weight_packed_for_cpu(*quantised)
        return self._turns(tiles), (state.absmax, filled.shape[1])

    def _gemv(self, x: torch.Tensor, tiles: torch.Tensor, wide: tuple[torch.Tensor, int]) -> torch.Tensor:
        absmax, columns = wide
        filled = torch.nn.functional.pad(x, (0, columns - self.shape[1]))
        result: torch.Tensor = torch.ops.bitsandbytes.gemv_4bit(
            filled, tiles, (self.shape[0], columns), absmax, torch.tensor(NF4_VALUES), NF4_BLOCK
        )
        return result

    def ours(self) -> Iterator[tuple[str, Product]]:
        """Yield format and product; the path is that of the environment."""
        weight, codes, packed = self._turns(self.weight), self._turns(self.codes), self._turns(self.packed)
        absmax = self.absmax.bfloat16()
        yield "bf16", lambda x: linear(x, weight())
        yield "int8", lambda x: linear_int8(x, codes(), self.scb)
        yield "nf4", lambda x: linear_nf4(x, packed(), absmax, self.shape)
        if native.available():
            sparse = self._ternary()
            words = self._turns(sparse.codes)
            yield "qmoe", lambda x: qmoe.linear_qmoe(x, replace(sparse, codes=words()))

    def _ternary(self) -> qmoe.QmoeMatrix:
        chance = torch.rand(self.shape)
        digits = (chance > 0.885).to(torch.uint8) + (chance > 0.9425).to(torch.uint8)
        scale = torch.rand(self.shape[0], 1) * 0.1
        return qmoe.encode(digits, torch.cat([-scale, scale], 1).flatten().bfloat16())


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=6144)
    parser.add_argument("--columns", type=int, default=2080)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 24, 128])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--paths", nargs="+", default=list(reversed(native.paths()))[:1], help="of our kernels, or off")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each time")
    parser.add_argument("--megabytes", type=float, default=600, help="of copies that take turns")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    print(f"{processor()}; torch {torch.__version__}, {given.threads} threads; {given.rows} x {given.columns}, ms")
    matrix = Matrix(given.rows, given.columns, given.megabytes)
    for name in ("int8", "int8_bitsandbytes", "nf4", "nf4_bitsandbytes"):
        print(f"quantise_{name:24}{least_ms(getattr(matrix, f'quantise_{name}'), given.seconds):9.2f}")
    print(f"\n{'':30}" + "".join(f"{tokens:>5} row" for tokens in given.tokens))

    def measure(form: str, way: str, product: Product) -> None:
        inputs = [torch.randn(tokens, given.columns).bfloat16() for tokens in given.tokens]
        times = [least_ms(lambda x=x: product(x), given.seconds) for x in inputs]  # type: ignore[misc]
        print(f"{form:6}{way:24}" + "".join(f"{ms:9.2f}" for ms in times), flush=True)

    with torch.inference_mode():
        for form, way, product in matrix.others():
            measure(form, way, product)
        for path in given.paths:
            os.environ["SWITCHRUN_KERNELS"] = path
            for form, product in matrix.ours():
                measure(form, f"ours {path}", product)


if __name__ == "__main__":
    main()
