"""The attention span of a layer: how far back its queries see, which determines which blocks may be freed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ulysses_infer.arithmetic import ceil_div


@dataclass(frozen=True)
class AttentionSpan:
    """What the queries of a layer see: all previous tokens, a sliding window, or their chunk.

    A window is in tokens, including the query's own; chunks are counted from position 0. With both, their intersection.
    """

    sliding_window: int | None = None
    chunk_size: int | None = None

    @property
    def is_limited(self) -> bool:
        """Whether later tokens do not see all earlier ones."""
        return self.sliding_window is not None or self.chunk_size is not None

    @property
    def length(self) -> int | None:
        """The most tokens that a query sees, including itself; None: all."""
        limits = [limit for limit in (self.sliding_window, self.chunk_size) if limit is not None]
        return min(limits, default=None)

    def within(self, max_model_len: int) -> AttentionSpan:
        """The same span without limits that have no effect up to `max_model_len`."""
        window, chunk = self.sliding_window, self.chunk_size
        return AttentionSpan(
            None if window is None or window >= max_model_len else window,
            None if chunk is None or chunk >= max_model_len else chunk,
        )

    def first_visible(self, position: int) -> int:
        """The earliest position that a query at `position` sees; later queries see none before it."""
        first = 0
        if self.sliding_window is not None:
            first = max(first, position - self.sliding_window + 1)
        if self.chunk_size is not None:
            first = max(first, position - position % self.chunk_size)
        return first

    def table_starts(self, positions: np.ndarray, block_size: int) -> np.ndarray:
        """The first block of each table passed to attention, for first queries at `positions` (int64).

        At or before the first visible block, so that windows and chunks can be counted from it.
        """
        firsts = np.zeros_like(positions)
        if self.sliding_window is not None:
            firsts = np.maximum(firsts, positions - self.sliding_window + 1)
        if self.chunk_size is None:
            return firsts // block_size
        firsts = np.maximum(firsts, positions - positions % self.chunk_size)
        return firsts // (whole := math.lcm(self.chunk_size, block_size)) * (whole // block_size)

    def most_blocks(self, num_tokens: int, step_tokens: int, block_size: int) -> int:
        """The most blocks that a sequence of `num_tokens` holds, with up to `step_tokens` tokens per step."""
        whole = ceil_div(num_tokens, block_size)
        length = self.length
        # The visible range of a step may begin and end anywhere in its blocks.
        return whole if length is None else min(whole, ceil_div(length - 1 + step_tokens, block_size) + 1)
