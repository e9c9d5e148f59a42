"""What the processors can do at best: reading memory, and bfloat16 matrix products. Measured between the engines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tools.compare_peers.asking import Answer, Measure, Task, serve

READ_BYTES = 1 << 29  # far beyond any cache
PRODUCTS = ((512, 1536, 4608), (2048, 1536, 4608), (2048, 2048, 2048), (512, 512, 3584))  # (m, k, n)
REPEATS = 5


def best_rate(work: float, run: Callable[[], Any]) -> float:
    """`work` a second, at the fastest of several runs."""
    fastest = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - started)
    return work / fastest


def start(options: dict[str, Any]) -> tuple[Measure, str]:
    """options: `threads`."""
    import torch

    torch.set_num_threads(options["threads"])
    memory = torch.ones(READ_BYTES // 4)

    def product(m: int, k: int, n: int) -> tuple[float, Callable[[], Any]]:
        x, weight = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
        return 2.0 * m * k * n, lambda: torch.nn.functional.linear(x, weight)

    products = [product(*sizes) for sizes in PRODUCTS]

    def measure(task: Task) -> Answer:
        rates = [best_rate(work, run) for work, run in products]
        return {"bandwidth": best_rate(READ_BYTES, memory.sum), "matmul": max(rates)}

    return measure, torch.__version__


if __name__ == "__main__":
    serve(start)
