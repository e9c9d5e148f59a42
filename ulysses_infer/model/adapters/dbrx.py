"""DBRX: a packed projection, split by sizes that transformers keeps under names of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.model.adapters.base import AdaptedAttention, replace_all
from ulysses_infer.model.adapters.rotary import rotate_halves


class DbrxAttention(AdaptedAttention):
    """q, k and v lie one after another, and are clipped."""

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; position_embeddings: cosine and sine; returns ([1, t, D], None)."""
        packed = self.Wqkv(hidden_states)
        if self.clip_qkv is not None:
            packed = packed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        counts = self.head_plan.local_attention_heads, *[self.head_plan.local_key_value_heads] * 2
        query, key, value = self.heads(packed).split(counts, dim=1)
        query, key = (rotate_halves(each, *position_embeddings) for each in (query, key))
        return self.out_proj(self.attend(query, key, value)), None


def adapt_dbrx(model: nn.Module) -> None:
    """Replace the attention modules."""
    replace_all(model, "DbrxAttention", DbrxAttention)
