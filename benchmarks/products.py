"""How long an expert's two products take, by torch's own call and by switchrun's: `python benchmarks/products.py`.

Prints a table in milliseconds, the median of 15, for the 2080 × 6144 of switch-c-2048; weights alternate, so that they
come from memory and not from the processor's cache.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import torch

from switchrun.kernels.plain import linear

D_MODEL, D_FF, EXPERTS, REPEATS = 2080, 6144, 6, 15

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def measure(dtype: torch.dtype, rows: int, product: Product) -> float:
    """Give the milliseconds of one expert for so many rows."""
    x = torch.randn(rows, D_MODEL).to(dtype)
    weights = itertools.cycle(_WEIGHTS[dtype])
    samples = []
    for _ in range(REPEATS + 2):
        wi, wo = next(weights)
        start = time.perf_counter()
        product(torch.relu(product(x, wi)), wo)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples[2:]) * 1e3


def expert(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Make one of random numbers."""
    scale = D_MODEL**-0.5
    return (torch.randn(D_FF, D_MODEL) * scale).to(dtype), (torch.randn(D_MODEL, D_FF) * scale).to(dtype)


_WEIGHTS = {dtype: [expert(dtype) for _ in range(EXPERTS)] for dtype in (torch.float32, torch.bfloat16)}

if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'dtype':>15} {'rows':>5} {'torch ms':>9} {'ours ms':>9} {'ratio':>6}")
    with torch.no_grad():
        for dtype, rows in itertools.product(_WEIGHTS, (1, 2, 4, 6, 8, 12, 16, 24, 32, 128)):
            stock, ours = measure(dtype, rows, torch.nn.functional.linear), measure(dtype, rows, linear)
            print(f"{dtype!s:>15} {rows:5} {stock:9.2f} {ours:9.2f} {stock / ours:6.2f}")
