"""Speed of one rank with random weights in bfloat16: decode against copying memory, prefill against a large product."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from benchmarks.profile_layout import Load, build_model, build_worker, measure
from tools.acceptance.check import Result, Settings, at_least, measured
from ulysses_infer.model.layers.matmul import linear
from ulysses_infer.parallel.layout import Layout, Mode
from ulysses_infer.worker.worker import Worker

SHAPE_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
MUCH_MEMORY = 60 << 30
LEAST_OF_COPY, LEAST_OF_PRODUCT = 0.85, 0.70


class Sizes(NamedTuple):
    """How much is measured."""

    copied_bytes: int
    side: int
    """Of the square matrices of the reference product."""
    context: int
    prompt: int
    requests: int
    repeats: int


FULL = Sizes(copied_bytes=1 << 30, side=8192, context=4096, prompt=8192, requests=32, repeats=20)
LESS = FULL._replace(context=2048, prompt=4096, requests=8)
"""For GPUs with less than `MUCH_MEMORY`; the weights take 15 GiB."""
QUICK = Sizes(copied_bytes=1 << 22, side=256, context=64, prompt=128, requests=4, repeats=3)


def check_speed(settings: Settings) -> Iterator[Result]:
    """The device's own rates, and what share of them a model of 8 billion parameters reaches."""
    device, applies = settings.device, settings.has_targets
    sizes, shape = (QUICK, SMALL) if settings.quick else (full_sizes(device), SHAPE_8B)
    copied, product = copy_rate(device, sizes), product_rate(device, sizes)
    yield measured("copying memory, reads and writes", copied / 1e9, "GB/s")
    yield measured("product of large bfloat16 matrices", product / 1e12, "TFLOP/s")
    for rows in (1, sizes.requests):
        share = linear_rate(device, sizes, shape, rows) / copied
        yield at_least(f"linear layers of {rows} rows / copying", share, LEAST_OF_COPY, applies)
    worker = make_worker(device, sizes, shape)
    one, many = Load(1, 1, sizes.context), Load(sizes.requests, 1, sizes.context)
    for load in (one, many):
        share = decode_bytes(worker, load) / seconds_of(worker, load, sizes) / copied
        yield at_least(f"decode of {load.requests} requests / copying", share, LEAST_OF_COPY, applies)
    prompt = Load(1, sizes.prompt, 0)
    share = prefill_operations(worker, sizes.prompt) / seconds_of(worker, prompt, sizes) / product
    yield at_least(f"prefill of {sizes.prompt} tokens / product", share, LEAST_OF_PRODUCT, applies)


def full_sizes(device: torch.device) -> Sizes:
    """How much is measured on this device."""
    is_small = device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < MUCH_MEMORY
    return LESS if is_small else FULL


def copy_rate(device: torch.device, sizes: Sizes) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.zeros(sizes.copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * sizes.copied_bytes / median_seconds(lambda: target.copy_(source), device, sizes.repeats)


def product_rate(device: torch.device, sizes: Sizes) -> float:
    """Floating-point operations per second of a product of square matrices."""
    a, b = (torch.randn(sizes.side, sizes.side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * sizes.side**3 / median_seconds(lambda: a @ b, device, sizes.repeats)


def linear_rate(device: torch.device, sizes: Sizes, shape: dict[str, int], rows: int) -> float:
    """Bytes of weights read per second by the linear layers of four layers, one after another."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    key_value = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = ((hidden + 2 * key_value, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner))
    weights = [torch.randn(*size, device=device, dtype=torch.bfloat16) for size in layer * 4]
    inputs = {size: torch.randn(rows, size, device=device, dtype=torch.bfloat16) for size in (hidden, inner)}

    def multiply() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight, None)

    return sum(weight.nbytes for weight in weights) / median_seconds(multiply, device, sizes.repeats)


def make_worker(device: torch.device, sizes: Sizes, shape: dict[str, int]) -> Worker:
    """A worker of one rank with random weights, and a cache for all loads."""
    loads = [Load(sizes.requests, 1, sizes.context), Load(1, sizes.prompt, 0)]
    longest = max(load.context + load.tokens for load in loads)
    values: dict[str, Any] = {**shape, "max_position_embeddings": longest, "tie_word_embeddings": False}
    config = LlamaConfig(**values, dtype="bfloat16")
    layout = Layout(Mode(1, 1))
    model = build_model(config, layout, 0, device, longest)
    return build_worker(model, layout, 0, loads, argparse.Namespace(block_size=16, attention_backend="auto"))


def seconds_of(worker: Worker, load: Load, sizes: Sizes) -> float:
    """Median seconds of a step, Python included."""
    return measure(worker, Mode(1, 1), load, sizes.repeats)


def decode_bytes(worker: Worker, load: Load) -> int:
    """Bytes that a decode step has to read: all weights but the embedding, and the keys and values."""
    model = worker.model
    embedding = model.module.get_input_embeddings().weight.nbytes
    per_token = worker.cache.shape.bytes_per_block // worker.cache.shape.block_size
    return int(model.weight_bytes - embedding + load.requests * (load.context + 1) * per_token)


def prefill_operations(worker: Worker, tokens: int) -> float:
    """Floating-point operations of a prompt: products of all tokens but the head's, and causal attention."""
    model = worker.model
    head = model.injection.head.rows().numel()
    linears = sum(p.numel() for p in model.module.parameters() if p.dim() == 2) - head
    linears -= model.module.get_input_embeddings().weight.numel()
    shape = model.shape
    attention = 2 * tokens**2 * shape.num_attention_heads * shape.key_width * shape.num_layers
    return 2.0 * linears * tokens + 2.0 * head + attention


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of `work`, after two runs that are not counted."""
    times = []
    for _ in range(repeats + 2):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def wait(device: torch.device) -> None:
    """Until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
