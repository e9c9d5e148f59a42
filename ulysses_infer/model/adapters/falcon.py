"""Falcon, old and new: rotary positions or ALiBi, and three ways to pack q, k and v."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.adapters.alibi import geometric_slopes
from ulysses_infer.model.adapters.base import AdaptedAttention, replace_all
from ulysses_infer.model.adapters.rotary import rotate_halves
from ulysses_infer.model.injection.rules import AttentionHeads, packed_heads, query_heads
from ulysses_infer.parallel.grouped_sharding import GroupedSharding
from ulysses_infer.parallel.sharding import Part, Sharding


def groups_of_heads(features: int, heads: AttentionHeads) -> Sharding:
    """The query heads of a KV head, then its key and its value, for every KV head."""
    if heads.layout is not None and heads.layout.is_padded:
        raise UnsupportedModelError(
            f"{heads.num_attention_heads} query heads in {heads.num_key_value_heads} groups, each packed with its key "
            f"and value, do not divide over {heads.layout.world_size} ranks"
        )
    group = heads.num_attention_heads // heads.num_key_value_heads
    width = features // (heads.num_attention_heads + 2 * heads.num_key_value_heads)
    key_value = Part(1, width, shared=True)
    return GroupedSharding((Part(group, width), key_value, key_value), heads.num_key_value_heads)


class FalconAttention(AdaptedAttention):
    """`alibi`: whether positions are slopes; then they are scaled like the scores."""

    def __init__(self, source: nn.Module, alibi: bool) -> None:
        super().__init__(source)
        self.num_key_value_heads = self.num_kv_heads
        grouped = self.new_decoder_architecture
        self.attention_rules = {"query_key_value": ("column", groups_of_heads if grouped else self._rule())}
        # transformers rounds them to bfloat16.
        slopes = geometric_slopes(self.num_heads).bfloat16().float() * self.inv_norm_factor
        self.register_buffer("slopes", slopes if alibi else None, persistent=False)

    def _rule(self) -> Any:
        return packed_heads if self.multi_query else query_heads

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; position_embeddings: cosine and sine, each [1, t, d]; returns ([1, t, D], None)."""
        query, key, value = (part.transpose(1, 2) for part in self._split(self.query_key_value(hidden_states)))
        if self.slopes is None:
            assert position_embeddings is not None
            query, key = (rotate_halves(each, *position_embeddings) for each in (query, key))
        return self.dense(self.attend(query, key, value, alibi=self.slopes)), None

    def _split(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """packed: [1, t, n]; returns q, k and v, each [1, t, heads, d]."""
        heads = self.head_plan.local_attention_heads, self.head_plan.local_key_value_heads
        if not self.new_decoder_architecture and self.multi_query:
            return packed.unflatten(-1, (-1, self.head_dim)).split((heads[0], heads[1], heads[1]), dim=2)
        group = heads[0] // heads[1]
        groups = packed.unflatten(-1, (heads[1], group + 2, self.head_dim))
        query, key, value = groups.split((group, 1, 1), dim=-2)
        return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


def adapt_falcon(model: Any) -> None:
    """Replace the attention modules, and the linear layers, which add their bias separately, by plain ones."""
    replace_all(model, "FalconLinear", _plain_linear)
    replace_all(model, "FalconAttention", lambda source: FalconAttention(source, model.config.alibi))


def _plain_linear(source: nn.Linear) -> nn.Linear:
    plain = nn.Linear(source.in_features, source.out_features, source.bias is not None, device="meta")
    plain.weight, plain.bias = source.weight, source.bias
    return plain
