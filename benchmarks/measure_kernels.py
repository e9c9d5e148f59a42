"""Speed of the native CPU kernels compared with torch's, alternating in one run.

    python -m benchmarks.measure_kernels [matmul] [quantised] [attention] [prompt] [write] [--threads 1]
        [--dtype bfloat16]

Weights and caches are larger than the CPU's caches and are visited one after another, like a model's layers. The table
shows the fastest call of each alternative and, in brackets, the median: other programs only make calls slower. With one
thread, CPU time is measured, which excludes waiting for a core.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from benchmarks.arguments import common_options
from benchmarks.processor import READ_BYTES, MemoryReader, processor
from ulysses_infer.attention.backend import AttentionMetadata, AttentionOptions
from ulysses_infer.attention.native import NativeAttention
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.cache.paged import CacheShape, PagedCache
from ulysses_infer.model.quantization.native_products import NativeWeights
from ulysses_infer.model.quantization.online import online_scheme
from ulysses_infer.native.matmul import NativeMatmul
from ulysses_infer.parallel.layout import Span

MEMORY_READS = 20
VISITED_BYTES = 400_000_000
WIDTH = 150  # of tables that are not printed to a terminal
WEIGHTS = ((2560, 1536), (9216, 1536), (1536, 4608), (16384, 1536))  # 0.5 B parameters: qkv, gate and up, down, head
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
BLOCK_SIZE = 16
CONTEXTS = ((1, 512), (1, 4096), (1, 32768), (8, 512), (8, 4096), (32, 512), (32, 2048), (128, 256))
PROMPTS = (
    (64, 0),
    (128, 0),
    (256, 0),
    (512, 0),
    (2048, 0),
    (8192, 0),
    (16, 8192),
    (64, 8192),
    (512, 1024),
    (512, 8192),
    (512, 30000),
    (2048, 6144),
)
QUANTISED = {
    "int8": online_scheme("int8", 0),
    "int4, groups of 32": online_scheme("int4", 32),
    "int4, groups of 128": online_scheme("int4", 128),
}
QUANTISED_ROWS = (1, 2, 4, 16, 64, 128, 512)
Calls = dict[str, Callable[[], Any]]


class Heads(NamedTuple):
    """Number of query heads, number of key/value heads, and head width."""

    query: int
    key_value: int
    width: int

    def __str__(self) -> str:
        return f"{self.query}/{self.key_value} heads of {self.width}"


OF_60M, OF_05B = Heads(8, 4, 64), Heads(12, 4, 128)


def fastest(calls: Calls, seconds: float) -> dict[str, tuple[float, float]]:
    """Seconds of the fastest and of the median call of each alternative, measured alternately."""
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
    """A table row: the shape, then time, memory bandwidth and arithmetic rate of each alternative."""
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
    """Products of few rows with the weights of a model with 0.5 B parameters."""
    table = table_of(f"matrix products, {dtype}", ("N", "K", "rows"), ("torch", "native"))
    native = NativeMatmul()
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


def quantised_calls(outputs: int, width: int) -> dict[str, tuple[Callable[[torch.Tensor], Any], int]]:
    """Products with bfloat16 weights [outputs, width] and with the same quantised; bytes of each."""
    dense = torch.randn(outputs, width).bfloat16()
    weights, native = itertools.cycle([dense.clone() for _ in range(VISITED_BYTES // dense.nbytes | 1)]), NativeMatmul()
    calls: dict[str, tuple[Callable[[torch.Tensor], Any], int]] = {
        "bfloat16": (lambda inputs: native(inputs, next(weights)), dense.nbytes)
    }
    for name, scheme in QUANTISED.items():
        parts = scheme.quantise(dense)
        size, visited = sum(part.nbytes for part in parts.values()), []
        for _ in range(VISITED_BYTES // size | 1):
            copies = {key: part.clone()[None] for key, part in parts.items()}
            visited.append(NativeWeights(scheme.stored_experts(copies, Span(0, outputs), Span(0, width))))
        calls[name] = partial(_multiply_quantised, itertools.cycle(visited)), size
    return calls


def _multiply_quantised(weights: Iterator[NativeWeights], inputs: torch.Tensor) -> torch.Tensor:
    return next(weights).product(inputs, None)


def measure_quantised(dtype: torch.dtype, seconds: float) -> Table:
    """Products with quantised weights, as `model.quantize` makes them, and with the same in bfloat16."""
    memory = READ_BYTES / MemoryReader().seconds(MEMORY_READS)
    table = Table(title=f"quantised products; memory is read at {memory / 1e9:.1f} GB/s")
    for column in ("N", "K", "rows", "weights", "us (median)", "GB/s", "of memory", "TFLOP/s", "x bfloat16"):
        table.add_column(column, justify="right")
    for outputs, width in WEIGHTS[1:3]:
        calls = quantised_calls(outputs, width)
        for rows in QUANTISED_ROWS:
            inputs = torch.randn(rows, width).bfloat16()
            times = fastest({name: partial(call, inputs) for name, (call, _) in calls.items()}, seconds)
            for name, (best, median) in times.items():
                speed, rate = calls[name][1] / best, 2 * rows * outputs * width / best
                cells = f"{best * 1e6:.0f} ({median * 1e6:.0f})", f"{speed / 1e9:.1f}", f"{speed / memory:.0%}"
                faster = f"{times['bfloat16'][0] / best:.2f}"
                table.add_row(str(outputs), str(width), str(rows), name, *cells, f"{rate / 1e12:.3f}", faster)
    return table


class Batch:
    """Sequences of equal length and context in a paged cache of several layers with shuffled blocks."""

    def __init__(self, count: int, length: int, context: int, dtype: torch.dtype, heads: Heads = OF_05B) -> None:
        self.heads = heads
        blocks = -(-context // BLOCK_SIZE)
        token_bytes = 2 * heads.key_value * heads.width * dtype.itemsize
        self.num_bytes = count * context * token_bytes
        layers = max(2, VISITED_BYTES // self.num_bytes | 1)
        shape = CacheShape.uniform(layers, heads.key_value, heads.width, heads.width, BLOCK_SIZE, dtype)
        self.cache = PagedCache(shape, count * blocks, torch.device("cpu"))
        for tensor in (*self.cache.keys, *self.cache.values):
            tensor.normal_()
        tables = torch.randperm(count * blocks).view(count, blocks)
        slots = [
            tables[i, p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
            for i in range(count)
            for p in range(context - length, context)
        ]
        self.metadata = AttentionMetadata(torch.stack(slots), [length] * count, [context] * count, tables)
        self.query = torch.randn(count * length, heads.query, heads.width).to(dtype)
        self.new = torch.randn(count * length, heads.key_value, heads.width).to(dtype)
        self._layers = itertools.cycle(range(layers))

    def attend(self, backend: Any) -> Callable[[], torch.Tensor]:
        """A call of `backend` on the next layer."""
        options = AttentionOptions(scaling=self.heads.width**-0.5)

        def call() -> torch.Tensor:
            layer = next(self._layers)
            return backend.attend(self.query, self.cache.keys[layer], self.cache.values[layer], self.metadata, options)

        return call

    def write(self) -> None:
        """Store the batch's tokens in the next layer."""
        self.cache.write(next(self._layers), self.metadata.slots, self.new, self.new)


def measure_attention(dtype: torch.dtype, seconds: float) -> Table:
    """Decodes: one query token per sequence."""
    title = f"attention of decodes, {OF_05B}, {dtype}"
    table = table_of(title, ("sequences", "context"), ("torch", "native"))
    for count, context in CONTEXTS:
        batch = Batch(count, 1, context, dtype)
        calls: Calls = {"torch": batch.attend(TorchLoopAttention()), "native": batch.attend(NativeAttention())}
        operations = 4 * count * context * OF_05B.query * OF_05B.width
        table.add_row(*row_of((count, context), fastest(calls, seconds), batch.num_bytes, operations))
    return table


def rate_of_products(dtype: torch.dtype, seconds: float) -> float:
    """Operations per second of a large matrix product, for comparison with attention."""
    size = 1024
    one, other = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    return 2 * size**3 / fastest({"torch": lambda: F.linear(one, other)}, seconds)["torch"][0]


def measure_prompts(dtype: torch.dtype, seconds: float) -> Table:
    """Prompts and their later chunks."""
    title = f"attention of prompts, {dtype}; a large product: {rate_of_products(dtype, seconds) / 1e12:.3f} TFLOP/s"
    table = table_of(title, ("heads", "tokens", "cached before"), ("torch", "native"))
    native = NativeAttention()
    native.longest_query = max(length for length, _ in PROMPTS)
    for heads, (length, past) in itertools.product((OF_60M, OF_05B), PROMPTS):
        batch = Batch(1, length, past + length, dtype, heads)
        calls: Calls = {"torch": batch.attend(TorchLoopAttention()), "native": batch.attend(native)}
        seen = length * past + length * (length + 1) // 2
        operations = 4 * seen * heads.query * heads.width
        table.add_row(*row_of((heads, length, past), fastest(calls, seconds), batch.num_bytes, operations))
    return table


def measure_writes(dtype: torch.dtype, seconds: float) -> Table:
    """Writes of keys and values of new tokens to the cache."""
    table = table_of(f"cache writes, {dtype}", ("tokens",), ("torch",))
    for count, length in ((1, 1), (8, 1), (32, 1), (128, 1), (1, 512)):
        batch = Batch(count, length, length + 100, dtype)
        size = 4 * count * length * OF_05B.key_value * OF_05B.width * dtype.itemsize
        table.add_row(*row_of((count * length,), fastest({"torch": batch.write}, seconds), size, 0))
    return table


MEASURES = {
    "matmul": measure_matmul,
    "quantised": measure_quantised,
    "attention": measure_attention,
    "prompt": measure_prompts,
    "write": measure_writes,
}


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0] if __doc__ else None, parents=[common_options(threads=1, seconds=0.5)]
    )
    parser.add_argument("what", nargs="*", choices=[[], *MEASURES], default=[], help="all, if none is given")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(f"{processor()}, {arguments.threads} thread(s)")
    with torch.inference_mode():
        for name in arguments.what or MEASURES:
            console.print(MEASURES[name](getattr(torch, arguments.dtype), arguments.seconds))


if __name__ == "__main__":
    main()
