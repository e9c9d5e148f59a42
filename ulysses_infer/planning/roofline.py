"""Times of single operations on a device, by roofline: the slower of computing and moving bytes, and a floor.

All functions take numbers or numpy arrays, so that `benchmarks/fit_hardware.py` fits the same formulas to measured
tables. Source of rooflines: Williams, Waterman and Patterson, CACM 2009.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SHARPNESS = 4  # of the corner between the two limits; real kernels reach neither near it


class Rate(NamedTuple):
    """What a kind of operation sustains."""

    flops: float
    """Floating-point operations per second; infinite where only bytes matter."""
    bytes_per_second: float
    floor_seconds: float
    """Seconds of the smallest operation, its launch within a CUDA graph included."""

    def seconds(self, flops: Any, num_bytes: Any) -> Any:
        """Seconds of an operation of `flops` operations that moves `num_bytes`."""
        computing, moving = flops / self.flops, num_bytes / self.bytes_per_second
        return self.floor_seconds + (computing**SHARPNESS + moving**SHARPNESS) ** (1 / SHARPNESS)


class Link(NamedTuple):
    """A collective on a number of ranks: seconds of the smallest message, and the bandwidth of large ones."""

    latency_seconds: float
    bytes_per_second: float


def product_seconds(rate: Rate, rows: Any, outputs: Any, inputs: Any, weight_bytes: float, input_bytes: float) -> Any:
    """A matrix product [rows, inputs] x [inputs, outputs]. weight_bytes, input_bytes: per element; outputs have 2."""
    moved = weight_bytes * outputs * inputs + rows * (input_bytes * inputs + 2 * outputs)
    return rate.seconds(2 * rows * outputs * inputs, moved)


def experts_seconds(rate: Rate, rows: Any, num_used: Any, inputs: Any, width: Any, weight_bytes: float) -> Any:
    """Gated experts of one layer: `rows` routed rows over `num_used` different experts of `width` neurons each."""
    weights = 3 * inputs * width
    return rate.seconds(2 * rows * weights, num_used * weights * weight_bytes + 4 * rows * inputs)


def experts_used(num_experts: Any, per_token: Any, tokens: Any) -> Any:
    """Expected number of different experts of `tokens` tokens with `per_token` experts each, evenly routed."""
    return num_experts * (1 - (1 - per_token / num_experts) ** tokens)


def prefill_attention_seconds(rate: Rate, heads: Any, width: Any, pairs: Any) -> Any:
    """Attention of prompt chunks with `pairs` visible query-key pairs."""
    return rate.seconds(4 * heads * width * pairs, 0.0)


def decode_attention_seconds(rate: Rate, cached_bytes: Any) -> Any:
    """Attention of decodes that read `cached_bytes` of keys and values."""
    return rate.seconds(0.0, cached_bytes)


def all_reduce_seconds(link: Link, ranks: int, num_bytes: Any) -> Any:
    """The sum of `num_bytes` per rank over `ranks` ranks."""
    return link.latency_seconds + 2 * (ranks - 1) / ranks * num_bytes / link.bytes_per_second


def exchange_seconds(link: Link, ranks: int, num_bytes: Any) -> Any:
    """An all-to-all, or an all-gather, in which every rank holds `num_bytes` in total."""
    return link.latency_seconds + (ranks - 1) / ranks * num_bytes / link.bytes_per_second
