"""The limits of the processors: memory bandwidth and matrix products. Measured between the engines.

Each by torch and by this project's kernels, in bfloat16, float32 and 8-bit integers, whichever is fastest: an engine
may compute in any of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.compare_peers.protocol import Answer, Measure, Task, serve

READ_BYTES = 1 << 29  # far beyond any cache
PRODUCTS = ((512, 1536, 4608), (2048, 1536, 4608), (2048, 2048, 2048), (512, 512, 3584))  # (m, k, n)
REPEATS = 5
ROW = 4096  # width of the weight that is read by multiplying it with one row of inputs


def best_rate(work: float, run: Callable[[], Any]) -> float:
    """`work` per second, at the fastest of several runs."""
    fastest = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - started)
    return work / fastest


def start(options: dict[str, Any]) -> tuple[Measure, str]:
    """options: `threads`."""
    import torch

    from ulysses_infer.native.matmul import make_matmul

    torch.set_num_threads(options["threads"])
    multiply = [torch.nn.functional.linear, make_matmul("auto", torch.device("cpu"))]
    ways = [way for way in multiply if way is not None]
    memory = torch.ones(READ_BYTES // 4)
    row, wide = torch.ones(1, ROW).bfloat16(), memory.view(torch.bfloat16).view(-1, ROW)

    def products(m: int, k: int, n: int) -> list[tuple[float, Callable[[], Any]]]:
        found: list[Callable[[], Any]] = []
        for dtype in (torch.bfloat16, torch.float32):
            x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            found += [lambda way=way, x=x, weight=weight: way(x, weight) for way in ways]  # type: ignore[misc]
        bytes_in, bytes_of_weight = torch.ones(m, k, dtype=torch.int8), torch.ones(k, n, dtype=torch.int8)
        found.append(lambda: torch._int_mm(bytes_in, bytes_of_weight))
        return [(2.0 * m * k * n, run) for run in found]

    every = [product for sizes in PRODUCTS for product in products(*sizes)]
    reads: list[Callable[[], Any]] = [memory.sum, *(lambda way=way: way(row, wide) for way in ways)]

    def measure(task: Task) -> Answer:
        return {
            "bandwidth": max(best_rate(READ_BYTES, read) for read in reads),
            "matmul": max(best_rate(work, run) for work, run in every),
        }

    return measure, torch.__version__


if __name__ == "__main__":
    serve(start)
