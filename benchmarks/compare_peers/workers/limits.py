"""The limits of the processors: memory bandwidth and matrix products. Measured between the engines.

Each by torch and by this project's kernels, in bfloat16, float32 and 8-bit integers, whichever is fastest: an engine
may compute in any of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.compare_peers.protocol import Answer, Measure, Task, serve

READ_BYTES = 1 << 29  # far beyond any cache
PRODUCTS = ((512, 512, 3584), (512, 1536, 4608), (2048, 2048, 2048), (2048, 1536, 4608))  # (m, k, n), smallest first
REPEATS = 5
HOPELESS = 4.0  # a way so many times slower than the fastest is not measured at larger sizes: some take minutes
ROW = 4096  # width of the weight that is read by multiplying it with one row of inputs


Way = Callable[[], Any]


def best_rate(work: float, run: Way, repeats: int = REPEATS) -> float:
    """`work` per second, at the fastest of several runs."""
    fastest = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - started)
    return work / fastest


def best_of_ways(sizes: Iterable[tuple[float, dict[str, Way]]], hopeless: set[str]) -> float:
    """Work per second of the fastest way at any size.

    sizes: work and named ways of each. hopeless: names of ways not to run; those that prove so are added.
    """
    best = 0.0
    for work, ways in sizes:
        rates = {name: best_rate(work, way, repeats=1) for name, way in ways.items() if name not in hopeless}
        hopeless |= {name for name, rate in rates.items() if rate * HOPELESS < max(rates.values())}
        best = max([best] + [best_rate(work, ways[name]) for name in rates if name not in hopeless])
    return best


def start(options: dict[str, Any]) -> tuple[Measure, str]:
    """options: `threads`."""
    import torch

    from ulysses_infer.native.matmul import make_matmul

    torch.set_num_threads(options["threads"])
    native = make_matmul("auto", torch.device("cpu"))
    linear = {"torch": torch.nn.functional.linear} | ({} if native is None else {"native": native})
    memory = torch.ones(READ_BYTES // 4)
    row, wide = torch.ones(1, ROW).bfloat16(), memory.view(torch.bfloat16).view(-1, ROW)

    def products(m: int, k: int, n: int) -> tuple[float, dict[str, Way]]:
        bytes_in, bytes_of_weight = torch.ones(m, k, dtype=torch.int8), torch.ones(k, n, dtype=torch.int8)
        ways: dict[str, Way] = {"torch int8": lambda: torch._int_mm(bytes_in, bytes_of_weight)}
        for dtype in (torch.bfloat16, torch.float32):
            x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            for name, way in linear.items():
                ways[f"{name} {dtype}"] = lambda way=way, x=x, weight=weight: way(x, weight)  # type: ignore[misc]
        return 2.0 * m * k * n, ways

    hopeless = set[str]()
    every = [products(*sizes) for sizes in PRODUCTS]
    reads: list[Way] = [memory.sum, *(lambda way=way: way(row, wide) for way in linear.values())]

    def measure(task: Task) -> Answer:
        return {
            "bandwidth": max(best_rate(READ_BYTES, read) for read in reads),
            "matmul": best_of_ways(every, hopeless),
        }

    return measure, torch.__version__


if __name__ == "__main__":
    serve(start)
