"""What `kernels/heads.py` does to query, key and value heads, and where it writes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class HeadNorm:
    """An RMS norm over each head, before the rotation; without weight: after it."""

    weight: torch.Tensor | None
    eps: float


@dataclass(frozen=True)
class HeadTemperature:
    """Queries are scaled by `1 + strength * log(1 + (position + 1) // length)`."""

    positions: torch.Tensor
    """[t] int64"""
    length: int
    strength: float


@dataclass(frozen=True)
class HeadTarget:
    """Where heads are written: [rows, shards, heads per shard, d], with dense heads. A cache has one shard."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    slots: torch.Tensor | None = None
    """[t] int64, the row of each token's key and value; None: the token's own."""
    key_scale: float = 1.0
    value_scale: float = 1.0


class PlaceHeads(Protocol):
    """Computes the query, key and value heads of a layer and writes them to a target."""

    def __call__(self, target: HeadTarget, query_index: torch.Tensor | None, index: torch.Tensor | None) -> None:
        """query_index, index: the query head and the KV head to read for each one written; None: in order.

        A target may have room for fewer tokens.
        """
        ...
