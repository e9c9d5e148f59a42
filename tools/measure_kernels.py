"""The speed of the CPU kernels beside torch's, every alternative in turn in one run.

    python tools/measure_kernels.py [matmul] [attention] [prompt] [write] [--threads 1] [--dtype bfloat16]

Weights and caches are larger than the processor's caches and visited in turn, as a model's layers are. The figures are
of each alternative's fastest call, with the median behind it: other programs only ever make a call slower. With one
thread it is processor time that counts, so that waiting for a core does not.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions
from ulysses_infer.attention.native import NativeAttention
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.cache.paged import CacheShape, PagedCache
from ulysses_infer.model.matmul import NativeMatmul

VISITED_BYTES = 400_000_000
WEIGHTS = ((2560, 1536), (9216, 1536), (1536, 4608), (16384, 1536))  # 0.5 B parameters: qkv, gate and up, down, head
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
HEADS, KEY_VALUE_HEADS, WIDTH, BLOCK_SIZE = 12, 4, 128, 16
CONTEXTS = ((1, 512), (1, 4096), (1, 32768), (8, 512), (8, 4096), (32, 512), (32, 2048), (128, 256))
PROMPTS = ((128, 0), (512, 0), (2048, 0), (512, 1024), (512, 8192), (512, 30000), (64, 8192))
Calls = dict[str, Callable[[], Any]]


def fastest(calls: Calls, seconds: float) -> dict[str, tuple[float, float]]:
    """Seconds of the fastest and of the median call, the alternatives taking turns."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < until or len(times[next(iter(calls))]) < 3:
        for name, call in calls.items():
            started = clock()
            call()
            times[name].append(clock() - started)
    return {name: (min(taken), statistics.median(taken)) for name, taken in times.items()}


def row_of(shape: Sequence[Any], times: dict[str, tuple[float, float]], num_bytes: int, operations: float) -> list[str]:
    """A table's row: what was computed, then time, rate of memory and rate of arithmetic of each alternative."""
    cells = [str(part) for part in shape]
    for best, median in times.values():
        cells += [f"{best * 1e6:.0f} ({median * 1e6:.0f})", f"{num_bytes / best / 1e9:.1f}"]
        cells += [f"{operations / best / 1e12:.3f}"]
    ratios = [f"{times['torch'][0] / best:.2f}x" for name, (best, _) in times.items() if name != "torch"]
    return cells + ratios


def table_of(title: str, shape: Sequence[str], names: Sequence[str]) -> Table:
    """An empty table for rows of `row_of`."""
    table = Table(title=title)
    for column in shape:
        table.add_column(column, justify="right")
    for name, what in itertools.product(names, ("us (median)", "GB/s", "TFLOP/s")):
        table.add_column(f"{name} {what}", justify="right")
    for name in names:
        if name != "torch":
            table.add_column(f"{name} faster", justify="right")
    return table


def _multiply(linear: Callable[..., Any], inputs: torch.Tensor, weights: Iterator[torch.Tensor]) -> Callable[[], Any]:
    return lambda: linear(inputs, next(weights))


def measure_matmul(dtype: torch.dtype, seconds: float) -> Table:
    """Products of few rows with the weights of a model of 0.5 B parameters."""
    table = table_of(f"matrix products, {dtype}", ("N", "K", "rows"), ("torch", "native"))
    native = NativeMatmul()
    native.most_rows = dict.fromkeys(native.most_rows, max(ROWS))
    for outputs, width in WEIGHTS:
        size = outputs * width * dtype.itemsize
        weights = itertools.cycle([torch.randn(outputs, width).to(dtype) for _ in range(VISITED_BYTES // size | 1)])
        for rows in ROWS:
            inputs = torch.randn(rows, width).to(dtype)
            times = fastest(
                {"torch": _multiply(F.linear, inputs, weights), "native": _multiply(native, inputs, weights)}, seconds
            )
            table.add_row(*row_of((outputs, width, rows), times, size, 2 * rows * outputs * width))
    return table


class Batch:
    """Sequences of one length and context each in a paged cache of several layers, their blocks shuffled."""

    def __init__(self, count: int, length: int, context: int, dtype: torch.dtype) -> None:
        blocks = -(-context // BLOCK_SIZE)
        token_bytes = 2 * KEY_VALUE_HEADS * WIDTH * dtype.itemsize
        self.num_bytes = count * context * token_bytes
        layers = max(2, VISITED_BYTES // self.num_bytes | 1)
        shape = CacheShape(layers, KEY_VALUE_HEADS, WIDTH, WIDTH, BLOCK_SIZE, dtype)
        self.cache = PagedCache(shape, count * blocks, torch.device("cpu"))
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.normal_()
        tables = torch.randperm(count * blocks).view(count, blocks)
        slots = [tables[i, p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
                 for i in range(count) for p in range(context - length, context)]  # fmt: skip
        self.metadata = AttentionMetadata(torch.stack(slots), [length] * count, [context] * count, tables)
        self.query = torch.randn(count * length, HEADS, WIDTH).to(dtype)
        self.new = torch.randn(count * length, KEY_VALUE_HEADS, WIDTH).to(dtype)
        self._layers = itertools.cycle(range(layers))

    def attend(self, backend: Any) -> Callable[[], torch.Tensor]:
        """A call of `backend` on the next layer."""
        options = AttentionOptions(scaling=WIDTH**-0.5)

        def call() -> torch.Tensor:
            layer = next(self._layers)
            return backend.attend(self.query, self.cache.keys[layer], self.cache.values[layer], self.metadata, options)

        return call

    def write(self) -> None:
        """Store the batch's tokens in the next layer."""
        self.cache.write(next(self._layers), self.metadata.slots, self.new, self.new)


def measure_attention(dtype: torch.dtype, seconds: float) -> Table:
    """Decodes: one query token a sequence."""
    title = f"attention of decodes, {HEADS}/{KEY_VALUE_HEADS} heads of {WIDTH}, {dtype}"
    table = table_of(title, ("sequences", "context"), ("torch", "native"))
    for count, context in CONTEXTS:
        batch = Batch(count, 1, context, dtype)
        calls: Calls = {"torch": batch.attend(TorchLoopAttention()), "native": batch.attend(NativeAttention())}
        times = fastest(calls, seconds)
        table.add_row(*row_of((count, context), times, batch.num_bytes, 4 * count * context * HEADS * WIDTH))
    return table


def measure_prompts(dtype: torch.dtype, seconds: float) -> Table:
    """Prompts and their later chunks."""
    table = table_of(f"attention of prompts, {dtype}", ("tokens", "cached before"), ("torch", "native"))
    native = NativeAttention()
    native.longest_query = max(length for length, _ in PROMPTS)
    for length, past in PROMPTS:
        batch = Batch(1, length, past + length, dtype)
        calls: Calls = {"torch": batch.attend(TorchLoopAttention()), "native": batch.attend(native)}
        times = fastest(calls, seconds)
        seen = length * past + length * (length + 1) // 2
        table.add_row(*row_of((length, past), times, batch.num_bytes, 4 * seen * HEADS * WIDTH))
    return table


def measure_writes(dtype: torch.dtype, seconds: float) -> Table:
    """Keys and values of new tokens into the cache."""
    table = table_of(f"cache writes, {dtype}", ("tokens",), ("torch",))
    for count, length in ((1, 1), (8, 1), (32, 1), (128, 1), (1, 512)):
        batch = Batch(count, length, length + 100, dtype)
        size = 4 * count * length * KEY_VALUE_HEADS * WIDTH * dtype.itemsize
        table.add_row(*row_of((count * length,), fastest({"torch": batch.write}, seconds), size, 0))
    return table


MEASURES = {
    "matmul": measure_matmul, "attention": measure_attention, "prompt": measure_prompts, "write": measure_writes,
}  # fmt: skip


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("what", nargs="*", choices=[[], *MEASURES], default=[], help="all, if none is given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.5, help="of every alternative and shape")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    with torch.inference_mode():
        for name in arguments.what or MEASURES:
            console.print(MEASURES[name](getattr(torch, arguments.dtype), arguments.seconds))


if __name__ == "__main__":
    main()
