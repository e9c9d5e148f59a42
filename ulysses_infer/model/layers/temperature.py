"""Attention temperatures that grow with the position (llama4's layers without rotary embedding)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Temperature:
    """Queries are scaled by `1 + strength * log(1 + floor((position + 1) / length))`."""

    length: int
    strength: float

    def scales(self, positions: torch.Tensor) -> torch.Tensor:
        """positions: [t] int64; returns [t] float32."""
        return torch.log1p(torch.floor((positions.float() + 1.0) / self.length)) * self.strength + 1.0

    def scaled(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """query: [..., t, d]; positions: [t] int64; returns the same shape and dtype as query."""
        return (query * self.scales(positions)[:, None]).to(query.dtype)


def take_temperature(attention: Any) -> Temperature | None:
    """The temperature of an attention module of transformers, which from then on applies none.

    Its own counts positions from the start of each step.
    """
    if not getattr(attention, "attn_temperature_tuning", False) or getattr(attention, "use_rope", True):
        return None
    attention.attn_temperature_tuning = False
    return Temperature(int(attention.floor_scale), float(attention.attn_scale))
