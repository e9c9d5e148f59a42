"""The collectives of a step in one mode, timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ulysses_infer.parallel.group import Group
from ulysses_infer.parallel.layout import Place, Span


class CollectiveClock:
    """Seconds this rank spent in each kind of collective, waiting for the others included.

    Where collectives run on a stream of their own (NCCL) it is the time to enqueue them.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def add(self, kind: str, started: float) -> None:
        """Count what passed since `started`, a `time.perf_counter()`."""
        self.count(kind, time.perf_counter() - started)

    def count(self, kind: str, seconds: float) -> None:
        """Count `seconds`."""
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """What was added since the last call, by kind."""
        taken, self._seconds = self._seconds, {}
        return taken


@dataclass(frozen=True)
class Collectives:
    """The collectives of one mode on one rank. A group is None where the mode has a single member."""

    place: Place
    sp_group: Group | None
    tp_group: Group | None
    clock: CollectiveClock = field(default_factory=CollectiveClock)

    def tokens_to_heads(self, sources: Sequence[torch.Tensor], tokens: Sequence[Span]) -> list[torch.Tensor]:
        """The forward all-to-all of Ulysses: my tokens for every shard become every token for my shard.

        sources: each [t, sp * h, d] with the heads of the SP group's shards in order; returns each as [T, h, d].
        """
        assert self.sp_group is not None
        started = time.perf_counter()
        received = self.sp_group.tokens_to_heads(sources, tokens)
        self.clock.add("all_to_all", started)
        return received

    def heads_to_tokens(self, output: torch.Tensor, tokens: Sequence[Span]) -> torch.Tensor:
        """The all-to-all back: all tokens of my heads become my tokens with the heads of the whole SP group.

        output: [T, C]; returns [t, sp * C] with the group's shards in order.
        """
        assert self.sp_group is not None
        started = time.perf_counter()
        received = self.sp_group.heads_to_tokens(output, tokens)
        self.clock.add("all_to_all", started)
        return received

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Concatenate uneven rows over the SP group. rows: [counts[mine], D]; returns [sum(counts), D]."""
        if self.sp_group is None:
            return rows
        started = time.perf_counter()
        received = self.sp_group.gather_rows(rows, counts)
        self.clock.add("all_to_all", started)
        return received

    def sum_over_tp(self, partial: torch.Tensor) -> torch.Tensor:
        """Add the partial results of the TP group in place; returns `partial`."""
        if self.tp_group is not None:
            started = time.perf_counter()
            self.tp_group.sum(partial)
            self.clock.add("all_reduce", started)
        return partial
