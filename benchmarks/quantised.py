"""Time and error of quantised experts: every way considered, beside bfloat16, for one expert of switch-c's size.

    python benchmarks/quantised.py [--d-model 2080] [--d-ff 6144] [--tokens 1 8 32] [--x bf16 fp32]

Random normal weights; an expert is wi [d_ff, d_model], ReLU, wo [d_model, d_ff]. A time is the least of several runs;
`x bf16` is it divided by that of the bfloat16 expert with as many tokens. Errors are relative, against the expert in
float32.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import bitsandbytes.functional as bnb
import torch

from switchrun.kernels.int8 import linear_int8, quantise_int8
from switchrun.kernels.nf4 import linear_nf4, linear_tiled, quantise_nf4, quantise_tiled
from switchrun.store.layout import nf4_layout, nf4_sizes

Linear = Callable[[torch.Tensor, int], torch.Tensor]


def least_ms(call: Callable[[], object], seconds: float) -> float:
    """Give the least time of a call, in milliseconds, of as many as fit and three at least."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times) * 1000


class Expert:
    """One expert in every form; a way to multiply takes the tokens and which matrix, 0 for wi or 1 for wo."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        torch.manual_seed(0)
        self.weights = [torch.randn(d_ff, d_model) * 0.03, torch.randn(d_model, d_ff) * 0.03]
        self.bf16 = [weight.bfloat16() for weight in self.weights]
        self.shapes = [(d_ff, d_model), (d_model, d_ff)]
        self.codes = [torch.empty(shape, dtype=torch.int8) for shape in self.shapes]
        self.scb = [torch.empty(shape[0]) for shape in self.shapes]
        sizes = [nf4_sizes(*shape) for shape in self.shapes]
        self.packed = [torch.empty(size, dtype=torch.uint8) for size, _ in sizes]
        self.absmax = [torch.empty(size) for _, size in sizes]
        layout = nf4_layout(d_model, d_ff, tiled=True)
        self.tiles = [torch.empty(layout[f"{name}.weight"].shape, dtype=torch.uint8) for name in ("wi", "wo")]
        self.scales = [torch.empty(layout[f"{name}.absmax"].shape).bfloat16() for name in ("wi", "wo")]

    def quantise_int8(self) -> None:
        """Ours."""
        for source, codes, scb in zip(self.bf16, self.codes, self.scb, strict=True):
            quantise_int8(source, codes, scb)

    def quantise_nf4(self) -> None:
        """Ours."""
        for source, packed, absmax in zip(self.bf16, self.packed, self.absmax, strict=True):
            quantise_nf4(source, packed, absmax)

    def quantise_nf4_in_tiles(self) -> None:
        """Ours, in the order of bitsandbytes' product; for sizes that are whole tiles."""
        for source, tiles, scales in zip(self.bf16, self.tiles, self.scales, strict=True):
            quantise_tiled(source, tiles, scales)

    def quantise_int8_bitsandbytes(self) -> None:
        """Theirs."""
        for source in self.bf16:
            bnb.int8_vectorwise_quant(source)

    def quantise_nf4_bitsandbytes(self) -> None:
        """Theirs."""
        for source in self.bf16:
            bnb.quantize_4bit(source, blocksize=64, quant_type="nf4")

    def ways(self) -> dict[str, Linear]:
        """Give the ways to multiply, by name."""
        return {
            "dense": lambda x, i: torch.nn.functional.linear(
                x, self.bf16[i] if x.dtype == torch.bfloat16 else self.weights[i]
            ),
            "int8: linear_int8": lambda x, i: linear_int8(x, self.codes[i], self.scb[i]),
            "int8: unpacked in blocks": lambda x, i: linear_int8(x.float(), self.codes[i], self.scb[i]).to(x.dtype),
            "int8: _weight_int8pack_mm": lambda x, i: torch.ops.aten._weight_int8pack_mm(
                x.bfloat16(), self.codes[i], (self.scb[i] / 127).bfloat16()
            ),
            "int8: bitsandbytes LLM.int8": self._llm_int8,
            "nf4: linear_nf4": lambda x, i: linear_nf4(x, self.packed[i], self.absmax[i], self.shapes[i]),
            "nf4: unpacked in blocks": lambda x, i: linear_nf4(
                x.float(), self.packed[i], self.absmax[i], self.shapes[i]
            ).to(x.dtype),
            "nf4: unpacked by bitsandbytes": self._nf4_bitsandbytes,
            "nf4: in tiles": lambda x, i: linear_tiled(x, self.tiles[i], self.scales[i], self.shapes[i]),
        }

    def _llm_int8(self, x: torch.Tensor, i: int) -> torch.Tensor:
        codes, stats, outliers = bnb.int8_vectorwise_quant(x.half(), threshold=6.0)
        operation = torch.ops.bitsandbytes.int8_mixed_scaled_mm
        result: torch.Tensor = operation(x, codes, self.codes[i], stats, self.scb[i], outliers)[0]
        return result

    def _nf4_bitsandbytes(self, x: torch.Tensor, i: int) -> torch.Tensor:
        flat = (self.shapes[i][0] * self.shapes[i][1] // 64, 64)
        weight = torch.ops.bitsandbytes.dequantize_4bit(self.packed[i], self.absmax[i], 64, "nf4", flat, x.dtype)
        return torch.nn.functional.linear(x, weight.view(self.shapes[i]))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--d-model", type=int, default=2080)
    parser.add_argument("--d-ff", type=int, default=6144)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--x", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each figure")
    options = parser.parse_args()
    expert = Expert(options.d_model, options.d_ff)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(f"expert {options.d_model} x {options.d_ff}, bfloat16 source\n\n{'quantiser':34}{'ms':>8}")
    quantisers = ["int8", "int8_bitsandbytes", "nf4", "nf4_in_tiles", "nf4_bitsandbytes"]
    for name in (f"quantise_{which}" for which in quantisers):
        print(f"{name:34}{least_ms(getattr(expert, name), options.seconds):8.1f}")
    ways = expert.ways()

    def run(linear: Linear, x: torch.Tensor) -> torch.Tensor:
        return linear(linear(x, 0).relu(), 1)

    print(f"\n{'x':6}{'tokens':>6}  {'way':30}{'ms':>8}{'x bf16':>8}{'error':>9}")
    for tokens in options.tokens:
        x = torch.randn(tokens, options.d_model)
        base = least_ms(lambda x=x: run(ways["dense"], x.bfloat16()), options.seconds)  # type: ignore[misc]
        for dtype in options.x:
            typed = x.bfloat16() if dtype == "bf16" else x
            reference = run(lambda x, i: torch.nn.functional.linear(x, expert.weights[i]), typed.float())
            for name, linear in ways.items():
                result = run(linear, typed).float()
                error = ((result - reference).norm() / reference.norm()).item()
                ms = least_ms(lambda: run(linear, typed), options.seconds)  # noqa: B023 - called at once
                print(f"{dtype:6}{tokens:6}  {name:30}{ms:8.2f}{ms / base:8.2f}{error:9.4f}", flush=True)


if __name__ == "__main__":
    main()
