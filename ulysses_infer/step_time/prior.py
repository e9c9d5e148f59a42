"""Estimates of step times from the sizes of the model, before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ulysses_infer.parallel.layout import Mode
from ulysses_infer.step_time.model import Measurement
from ulysses_infer.step_time.step_shape import StepShape

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
CONTEXTS = (16, 512, 4096)


class Sizes(NamedTuple):
    """The sizes of a model that determine step times."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_width: int
    num_parameters: int
    item_bytes: int
    """Bytes of a weight and of a cached value."""
    skipped_share: float = 0.0
    """Share of the layers that only tokens whose logits are needed run through, at the end."""


class Machine(NamedTuple):
    """Nominal speeds of one rank. Only their ratios matter: the first steps set the scale of all modes."""

    flops: float
    memory_bytes: float
    """Bytes per second, read from memory."""
    link_bytes: float
    """Bytes per second, to the other ranks."""
    latency: float
    """Seconds of an empty collective."""


CPU = Machine(1e12, 12e9, 1.5e9, 100e-6)
GPU = Machine(400e12, 3e12, 200e9, 15e-6)


def step_seconds(sizes: Sizes, machine: Machine, mode: Mode, shape: StepShape) -> float:
    """A step's time by the roofline: reading weights or computing products, reading the cache, and communication.

    Communication per layer and token follows Hidayetoglu et al., "Shift Parallelism", arXiv 2509.16495, table of
    communication: two all-reduces of the hidden state in tensor parallelism; queries, keys, values and outputs in
    Ulysses.
    """
    world_size, skipped = mode.world_size, sizes.skipped_share
    tokens = shape.num_tokens * (1 - skipped) + shape.num_sequences * skipped
    reading = sizes.num_parameters * sizes.item_bytes / mode.tp / machine.memory_bytes
    computing = 2 * sizes.num_parameters * tokens / world_size / machine.flops
    width = sizes.head_width * sizes.item_bytes * sizes.num_layers
    cached = 2 * sizes.num_key_value_heads / world_size * width * (shape.decode_context + shape.prefill_context)
    pairs = 4 * sizes.num_attention_heads * sizes.head_width * sizes.num_layers / world_size
    seen = (shape.fresh_pairs + shape.past_pairs) * (1 - skipped) + shape.prefill_context * skipped
    attending = cached / machine.memory_bytes + pairs * seen / machine.flops
    return max(reading, computing) + attending + _sending(sizes, machine, mode, tokens)


def _sending(sizes: Sizes, machine: Machine, mode: Mode, tokens: float) -> float:
    reduced = 4 * sizes.hidden_size * (mode.tp - 1) / mode.tp / mode.sp
    heads = 2 * (sizes.num_attention_heads + sizes.num_key_value_heads)
    traded = heads * sizes.head_width / mode.world_size * (mode.sp - 1) / mode.sp
    calls = 2 * (mode.tp > 1) + 2 * (mode.sp > 1)
    sent = (reduced + traded) * tokens * sizes.item_bytes / machine.link_bytes
    return sizes.num_layers * (sent + calls * machine.latency)


def assumed_steps(sizes: Sizes, machine: Machine, modes: Iterable[Mode]) -> list[Measurement]:
    """Steps of every kind with their estimated times."""
    shapes = [StepShape.of([], [(0, tokens)]) for tokens in TOKENS]
    shapes += [StepShape.of([], [(context, tokens)]) for context in CONTEXTS for tokens in TOKENS[2:6]]
    shapes += [StepShape.of([context] * count, []) for context in CONTEXTS for count in TOKENS[:5]]
    return [Measurement(mode, shape, step_seconds(sizes, machine, mode, shape)) for mode in modes for shape in shapes]
