"""The synthetic steps that a calibration measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ulysses_infer.arithmetic import ceil_div
from ulysses_infer.step_time.step_shape import StepShape

TOKENS = (2, 8, 32, 128, 512, 2048, 8192)
FINE_TOKENS = tuple(sorted({*(2**power for power in range(1, 15)), *(3 * 2**power for power in range(12))}))
CONTEXTS = (16, 1024, 4096, 16384)
CHUNKS = (32, 512, 2048)
"""Prompt tokens of a step after a cached context."""
DECODES = (1, 2, 8, 32, 128)
VERIFIED_ROWS = (3, 4, 5, 6, 7, 10, 12, 14, 16)
"""Rows of decode steps between `DECODES`, as drafted tokens make them. Measuring a size also records its CPU graph, so
none of them is left out because few tokens are cached."""
VERIFIED_CONTEXT = 256


class Point(NamedTuple):
    """A step to measure: `decodes` of `context` tokens each, and chunks as (start, tokens)."""

    decodes: int
    context: int
    chunks: tuple[tuple[int, int], ...] = ()

    @property
    def sequences(self) -> list[tuple[int, int]]:
        """Every sequence as (start, tokens)."""
        return [(self.context - 1, 1)] * self.decodes + list(self.chunks)

    @property
    def shape(self) -> StepShape:
        """The features that its time depends on."""
        return StepShape.of([self.context] * self.decodes, list(self.chunks))


class Limits(NamedTuple):
    """Limits of a step."""

    num_tokens: int
    num_sequences: int
    context: int
    cached: int
    """Tokens of cache for all its sequences."""


def design(limits: Limits, tokens: Sequence[int] = TOKENS) -> list[Point]:
    """Points that separate the features of a step, within `limits`, cheap ones first."""
    points = [Point(0, 0, ((0, count),)) for count in (*tokens, ceil_div(limits.num_tokens, 2), limits.num_tokens)]
    points += [Point(0, 0, ((context, count),)) for context in CONTEXTS[1:] for count in CHUNKS]
    points += [Point(count, context) for context in CONTEXTS for count in (*DECODES, limits.num_sequences)]
    points += [Point(rows, min(VERIFIED_CONTEXT, limits.context, limits.cached // rows or 1)) for rows in VERIFIED_ROWS]
    points += [Point(8, 256, ((0, chunk),)) for chunk in (32, 256)]
    points += [Point(8, 1024, ((1024, chunk - 8),)) for chunk in CHUNKS[1:]]
    points += [Point(0, 0, ((0, 16),) * count) for count in (4, 16)] + [Point(0, 0, ((0, 128),) * 4)]
    points += [Point(8, 1024, ((0, limits.num_tokens // 12),) * 11)] if limits.num_tokens >= 512 else []  # full steps
    fitting = {point for point in points if _fits(point, limits)}
    return sorted(fitting, key=lambda point: (point.shape.num_tokens, point.shape.decode_context, point))


def _fits(point: Point, limits: Limits) -> bool:
    ends = [start + count for start, count in point.sequences]
    shape = point.shape
    return (
        shape.num_tokens <= limits.num_tokens
        and len(ends) <= limits.num_sequences
        and max(ends) <= limits.context
        and sum(ends) <= limits.cached
    )
