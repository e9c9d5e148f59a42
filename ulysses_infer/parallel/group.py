"""The interface of process groups: the exchanges of a step, and the mailbox for messages of rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from ulysses_infer.parallel.layout import Span


class Group(Protocol):
    """Some ranks in a fixed order. Every method is collective: all members call it alike, in the same order."""

    @property
    def ranks(self) -> list[int]:
        """The members, in the order of the group."""

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """Add up in place; returns `partial`. Every member gets the same bits."""

    def tokens_to_heads(self, sources: Sequence[torch.Tensor], tokens: Sequence[Span]) -> list[torch.Tensor]:
        """sources: each [t, n * h, d], my tokens with the heads of all n members; returns each as [T, h, d], all
        tokens with my heads. The last dimension of a source is dense."""

    def heads_to_tokens(self, output: torch.Tensor, tokens: Sequence[Span]) -> torch.Tensor:
        """output: [T, C], all tokens with my heads; returns [t, n * C], my tokens with the heads of all members."""

    def gather_rows(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """rows: [counts[mine], D]; returns [sum(counts), D], the members' one after the other."""

    def gather_to_first(self, shard: torch.Tensor) -> torch.Tensor | None:
        """Every member's `shard`, all of one shape, on the first: [n, *shape]; None elsewhere."""


class Mailbox(Protocol):
    """Messages of rank 0 to every other rank, in order."""

    def send(self, message: bytes) -> None:
        """Rank 0: tell every other rank."""

    def receive(self) -> bytes:
        """Every other rank: wait for the next message, for days if need be."""
