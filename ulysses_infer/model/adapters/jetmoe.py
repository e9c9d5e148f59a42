"""JetMoE: the projections of queries and outputs are mixtures of experts, each with one query head per KV head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ulysses_infer.model.adapters.base import AdaptedAttention, replace_all
from ulysses_infer.model.adapters.rotary import rotate_halves
from ulysses_infer.model.context import step_context
from ulysses_infer.model.injection.rules import AttentionHeads
from ulysses_infer.parallel.sharding import Sharding


def keys_then_values(features: int, heads: AttentionHeads) -> Sharding:
    """All keys, then all values."""
    return Sharding((heads.key_value_part(features // 2),) * 2)


class JetmoeAttention(AdaptedAttention):
    """Every rank has all experts, and attends with its own heads."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        self.attention_rules = {"kv_proj": ("column", keys_then_values)}

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None, None]:
        """hidden_states: [1, t, D]; position_embeddings: cosine and sine; returns ([1, t, D], None, None)."""
        plan, context = self.head_plan, step_context()
        place = context.collectives.place
        own = plan.heads.query_span(place.weight_index, place.mode.tp)
        queries, _router_logits, chosen = self.experts.map(hidden_states)  # [1, t, K, Hkv * d], K experts per token
        whole = queries.unflatten(-1, (-1, self.head_dim)).transpose(2, 3).flatten(2, 3)
        query = whole[:, :, own.start : own.stop].transpose(1, 2)
        key, value = map(self.heads, self.kv_proj(hidden_states).chunk(2, dim=-1))
        query, key = (rotate_halves(each, *position_embeddings) for each in (query, key))
        attended = self.attend(query, key, value).unflatten(-1, (-1, self.head_dim))
        whole = F.pad(attended, (0, 0, own.start, plan.num_attention_heads - own.stop))
        by_expert = whole.unflatten(2, (plan.num_key_value_heads, -1)).transpose(2, 3).flatten(3)
        partial = self.experts.reduce(by_expert, chosen) - self.experts.bias
        return context.collectives.sum_over_tp(partial) + self.experts.bias, None, None


def adapt_jetmoe(model: nn.Module) -> None:
    """Replace the attention modules."""
    replace_all(model, "JetMoeAttention", JetmoeAttention)
