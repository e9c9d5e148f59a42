"""The collectives of a step in one mode, timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ulysses_infer.kernels.scaled_rows import NONE, QuantisedRows
from ulysses_infer.parallel.group import ProcessGroup
from ulysses_infer.parallel.layout import Place, Span


class CollectiveClock:
    """Seconds that this rank spent in each kind of collective, including waiting for other ranks.

    With NCCL, whose collectives run on their own stream, this is the time to enqueue them.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def add(self, kind: str, started: float) -> None:
        """Add the time since `started`, a `time.perf_counter()`."""
        self.count(kind, time.perf_counter() - started)

    def count(self, kind: str, seconds: float) -> None:
        """Add `seconds`."""
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Seconds added since the last call, by kind."""
        taken, self._seconds = self._seconds, {}
        return taken


class ResidualNorm(Protocol):
    """An RMS norm with the residual addition before it."""

    weight: torch.Tensor
    eps: float

    def add_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor, kind: int = NONE
    ) -> tuple[torch.Tensor, torch.Tensor | QuantisedRows]:
        """`residual + x` and its norm, all [..., D]; may overwrite `residual` with the sum."""
        ...


@dataclass(frozen=True)
class Collectives:
    """The collectives of one mode on one rank. A process group is None if it would have one rank."""

    place: Place
    sp_group: ProcessGroup | None
    tp_group: ProcessGroup | None
    clock: CollectiveClock = field(default_factory=CollectiveClock)
    world_group: ProcessGroup | None = None
    """All ranks of the replica, in every mode."""

    def tokens_to_heads(self, sources: Sequence[torch.Tensor], tokens: Sequence[Span]) -> list[torch.Tensor]:
        """The forward all-to-all of Ulysses: from this rank's tokens with all heads to all tokens with its heads.

        sources: each [t, sp * h, d] with the heads of the SP group's shards in order; returns each as [T, h, d].
        """
        assert self.sp_group is not None
        started = time.perf_counter()
        received = self.sp_group.tokens_to_heads(sources, tokens)
        self.clock.add("all_to_all", started)
        return received

    def heads_to_tokens(self, output: torch.Tensor, tokens: Sequence[Span]) -> torch.Tensor:
        """The reverse all-to-all: from all tokens with this rank's heads to its tokens with all heads of the SP group.

        output: [T, C]; returns [t, sp * C] with the group's shards in order.
        """
        assert self.sp_group is not None
        started = time.perf_counter()
        received = self.sp_group.heads_to_tokens(output, tokens)
        self.clock.add("all_to_all", started)
        return received

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """All-gather uneven rows over the SP group.

        rows: [counts[index of this rank], D]; returns [sum(counts), D].
        """
        if self.sp_group is None:
            return rows
        started = time.perf_counter()
        received = self.sp_group.gather_rows(rows, counts)
        self.clock.add("all_to_all", started)
        return received

    def sum_over_tp(self, partial: torch.Tensor) -> torch.Tensor:
        """All-reduce over the TP group in place; returns `partial`."""
        if self.tp_group is not None:
            started = time.perf_counter()
            self.tp_group.sum(partial)
            self.clock.add("all_reduce", started)
        return partial

    def sum_over_all(self, partial: torch.Tensor) -> torch.Tensor:
        """All-reduce over all ranks of the replica in place, in any mode; returns `partial`."""
        if self.world_group is not None:
            started = time.perf_counter()
            self.world_group.sum(partial)
            self.clock.add("all_reduce", started)
        return partial

    def sum_add_norm(
        self, partial: torch.Tensor, residual: torch.Tensor, norm: ResidualNorm, kind: int = NONE
    ) -> tuple[torch.Tensor, torch.Tensor | QuantisedRows]:
        """`norm.add_and_norm` of the sum of `partial` over the TP group, in one kernel where the group has one.

        May overwrite `partial` and `residual`.
        """
        if self.tp_group is not None:
            started = time.perf_counter()
            normed = self.tp_group.sum_add_norm(partial, residual, norm.weight, norm.eps, kind)
            self.clock.add("all_reduce", started)
            if normed is not None:
                return residual, normed
        return norm.add_and_norm(self.sum_over_tp(partial), residual, kind)
