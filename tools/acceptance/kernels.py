"""Attention kernels of the device against the torch loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from tools.acceptance.check import Result, Settings, SkippedError, at_most
from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.attention.backend import AttentionBackend, AttentionMetadata, AttentionOptions
from ulysses_infer.attention.native import NativeAttention
from ulysses_infer.attention.selection import AttentionNeeds, choose, installed_backends, make_gpu_backend
from ulysses_infer.attention.torch_loop import TorchLoopAttention
from ulysses_infer.cache.paged import FP8
from ulysses_infer.errors import ConfigError
from ulysses_infer.native.library import is_available
from ulysses_infer.parallel.layout import Mode
from ulysses_infer.worker.attention_inputs import AttentionInputs
from ulysses_infer.worker.block_tables import BlockTables
from ulysses_infer.worker.step_plan import LAST_LOGITS, PlanItem, StepPlan
from ulysses_infer.worker.transfer import make_inputs

QUERY_HEADS, KEY_VALUE_HEADS, WIDTH = 8, 2, 128
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest difference, for values around 1."""


class Sequences(NamedTuple):
    """A step: new tokens and all tokens of each sequence."""

    name: str
    lengths: list[int]
    contexts: list[int]


def steps(quick: bool) -> list[Sequences]:
    """The steps to compare."""
    scale = 1 if quick else 8
    return [
        Sequences("decode", [1] * 5, [1, 7, 40 * scale, 65 * scale, 130 * scale]),
        Sequences("prefill", [50 * scale], [50 * scale]),
        Sequences("mixed", [1, 33 * scale, 1, 20], [90 * scale, 70 * scale, 3, 20]),
    ]


def options(device: torch.device) -> dict[str, AttentionOptions]:
    """The kinds of attention."""
    scaling = WIDTH**-0.5
    sinks = torch.linspace(-1, 2, QUERY_HEADS, device=device)
    return {
        "full": AttentionOptions(scaling),
        "window": AttentionOptions(scaling, sliding_window=24),
        "soft cap": AttentionOptions(scaling, softcap=20.0),
        "sinks": AttentionOptions(scaling, sinks=sinks),
        "chunks": AttentionOptions(scaling, chunk_size=32),
        "ALiBi": AttentionOptions(scaling, alibi=torch.linspace(0.5, 0.01, QUERY_HEADS, device=device)),
    }


def check_kernels(settings: Settings) -> Iterator[Result]:
    """The largest difference of every backend, for every kind of attention, over all steps."""
    dtype = torch.float32 if settings.device.type == "cpu" else torch.bfloat16
    names = _names(settings.device)
    if not names:
        raise SkippedError("the native kernels cannot be built here")
    for name in names:
        for kind, asked in options(settings.device).items():
            backend = _backend(name, settings.device, dtype, dtype, asked)
            if backend is not None:
                found = max(difference(backend, step, asked, settings.device, dtype) for step in steps(settings.quick))
                yield at_most(f"attention {name}, {kind}: difference", found, TOLERANCE[dtype])
    if settings.device.type == "cuda":
        yield _fp8_cache(settings)


def _fp8_cache(settings: Settings) -> Result:
    """Both read the same cache, so they differ by rounding alone."""
    dtype, asked = torch.bfloat16, options(settings.device)["full"]
    backend = _backend("triton", settings.device, dtype, FP8, asked)
    if backend is None:
        raise SkippedError("triton is not installed")
    found = max(difference(backend, step, asked, settings.device, dtype, FP8) for step in steps(settings.quick))
    return at_most("attention triton, FP8 cache: difference", found, TOLERANCE[dtype])


def _names(device: torch.device) -> list[str]:
    if device.type == "cpu":
        return ["native"] if is_available("attention") else []
    return sorted(installed_backends() - {"torch"})


def _backend(
    name: str, device: torch.device, dtype: torch.dtype, cache: torch.dtype, asked: AttentionOptions
) -> AttentionBackend | None:
    """The backend `name`, or None if it does not support what is asked."""
    if name == "native":
        return NativeAttention()
    capability = torch.cuda.get_device_capability(device)
    needs = AttentionNeeds.of([asked], 1 << 20, capability, dtype, cache, WIDTH, WIDTH, _block_size(name))
    try:
        choose(name, needs, installed_backends())
    except ConfigError:
        return None
    return make_gpu_backend(name, device, needs)


def _block_size(name: str) -> int:
    return 256 if name == "flash_attn" else 16


def difference(
    backend: AttentionBackend,
    step: Sequences,
    asked: AttentionOptions,
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
) -> float:
    """The largest difference between a backend and the torch loop on random numbers."""
    size = _block_size(backend.name)
    generator = torch.Generator().manual_seed(0)
    blocks = sum(ceil_div(context, size) for context in step.contexts)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    query = random(sum(step.lengths), QUERY_HEADS, WIDTH)
    keys, values = (random(blocks, size, KEY_VALUE_HEADS, WIDTH).to(cache_dtype or dtype) for _ in range(2))
    metadata = step_metadata(step, asked, size, device)
    found = backend.attend(query, keys, values, metadata, asked)
    if cache_dtype is not None:
        keys, values = keys.to(dtype), values.to(dtype)
    expected = TorchLoopAttention().attend(query, keys, values, metadata, asked)
    return float((found.float() - expected.float()).abs().max())


def step_metadata(step: Sequences, asked: AttentionOptions, size: int, device: torch.device) -> AttentionMetadata:
    """The step as a worker lays it out and sends it to the device; the blocks of the sequences are shuffled."""
    counts = [ceil_div(context, size) for context in step.contexts]
    free, items = np.random.default_rng(0).permutation(sum(counts)).tolist(), []
    for index, (length, context, count) in enumerate(zip(step.lengths, step.contexts, counts, strict=True)):
        items.append(PlanItem(index, context - length, length, free[:count], LAST_LOGITS))
        free = free[count:]
    tables = BlockTables(size, len(items), max(counts), (asked.span,))
    plan = StepPlan(0, Mode(1, 1), items, np.zeros(sum(step.lengths), np.int32), [], full_logits=True)
    inputs = AttentionInputs(tables.apply(plan), for_kernels=device.type != "cpu")
    (metadata,) = inputs.metadata(make_inputs(device).send(inputs.to_send()))
    return metadata
