"""The interface of process groups: the collectives of a step, and the mailbox for messages from rank 0.

Three kinds of group occur in this package, and names say which is meant. A *process group* is a set of ranks that
communicate. A *cache group* is a set of layers that share a block table (`cache/groups.py`). A *query group* is the
set of query heads that share a KV head (GQA).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ulysses_infer.kernels.scaled_rows import QuantisedRows
from ulysses_infer.parallel.layout import Span


class ProcessGroup(Protocol):
    """Ranks in a fixed order. Every method is collective: all ranks call the same methods in the same order."""

    @property
    def ranks(self) -> list[int]:
        """The ranks of the job that belong to the group, in group order."""

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """All-reduce in place; returns `partial`. The result is bitwise equal on all ranks."""

    def sum_add_norm(
        self, partial: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, kind: int
    ) -> torch.Tensor | QuantisedRows | None:
        """All-reduce `partial` [..., D], add it to `residual` in place, and return the RMS norm of that, all in one.

        kind: the quantisation of the norm (kernels/scaled_rows.py). None, with nothing done, if the group has no such
        kernel, or none for these tensors; the same on all ranks.
        """

    def tokens_to_heads(self, sources: Sequence[torch.Tensor], tokens: Sequence[Span]) -> list[torch.Tensor]:
        """sources: each [t, n * h, d], this rank's tokens with the heads of all n ranks; returns each as [T, h, d],
        all tokens with this rank's heads. The last dimension of a source is dense."""

    def heads_to_tokens(self, output: torch.Tensor, tokens: Sequence[Span]) -> torch.Tensor:
        """output: [T, C], all tokens with this rank's heads; returns [t, n * C], this rank's tokens with all heads."""

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """All-gather. rows: [counts[index of this rank], D]; returns [sum(counts), D], in group order."""

    def gather_to_first(self, shard: torch.Tensor) -> torch.Tensor | None:
        """Gather the `shard` of every rank, all of one shape, on the first: [n, *shape]; None elsewhere."""


class Mailbox(Protocol):
    """Messages from rank 0 to all other ranks, in order."""

    def send(self, message: bytes) -> None:
        """Send a message to all other ranks; rank 0 only."""

    def receive(self) -> bytes:
        """Wait for the next message without a timeout; all ranks except 0."""
