"""Bloom: ALiBi, and attention computed in the module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.model.adapters.alibi import geometric_slopes
from ulysses_infer.model.adapters.base import AdaptedAttention, replace_all


class BloomAttention(AdaptedAttention):
    """q, k and v of each head lie next to each other."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        self.register_buffer("slopes", geometric_slopes(self.num_heads), persistent=False)

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """hidden_states, residual: [1, t, D]; returns ([1, t, D], None), the residual added."""
        packed = self.query_key_value(hidden_states).unflatten(-1, (-1, 3, self.head_dim))
        heads = (part.transpose(1, 2) for part in packed.unbind(-2))
        return self.dense(self.attend(*heads, alibi=self.slopes)) + residual, None


def adapt_bloom(model: nn.Module) -> None:
    """Replace the attention modules."""
    replace_all(model, "BloomAttention", BloomAttention)
