"""GPT-J and CodeGen: rotary positions of interleaved pairs, and attention computed in the module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.adapters.base import AdaptedAttention, replace_all
from ulysses_infer.model.adapters.rotary import rotate_pairs
from ulysses_infer.model.injection.rules import AttentionHeads
from ulysses_infer.parallel.grouped_sharding import GroupedSharding
from ulysses_infer.parallel.sharding import Part, Sharding

BLOCKS = 4
"""CodeGen's checkpoints were written by four ranks: each block has the queries, values and keys of a quarter."""


class GptjAttention(AdaptedAttention):
    """Rotates as many columns of each head as the table of sines has, or all."""

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; position_ids: [1, t]; returns ([1, t, D], None)."""
        query, key, value = self.project(hidden_states)
        sine, cosine = self.embed_positions[position_ids].to(query.dtype).chunk(2, dim=-1)
        query, key = (rotate_pairs(each, cosine, sine) for each in (query, key))
        return self.out_proj(self.attend(query, key, value)), None

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, each [1, heads, t, d]."""
        return tuple(self.heads(each(hidden_states)) for each in (self.q_proj, self.k_proj, self.v_proj))


def quarters_of_heads(features: int, heads: AttentionHeads) -> Sharding:
    """Queries, values and keys of a quarter of the heads, four times."""
    layout = heads.layout
    if layout is not None and (layout.is_padded or (BLOCKS % layout.world_size and layout.world_size % BLOCKS)):
        raise UnsupportedModelError(
            f"CodeGen stores its {heads.num_attention_heads} heads in {BLOCKS} blocks, which do not divide over "
            f"{layout.world_size} ranks; use a divisor or a multiple of {BLOCKS}"
        )
    part = Part(heads.num_attention_heads // BLOCKS, features // (3 * heads.num_attention_heads))
    return GroupedSharding((part,) * 3, BLOCKS)


class CodegenAttention(GptjAttention):
    """GPT-J's, with one packed projection."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        self.attention_rules = {"qkv_proj": ("column", quarters_of_heads)}

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values, each [1, heads, t, d]."""
        plan = self.head_plan
        blocks = max(1, BLOCKS * plan.local_attention_heads // plan.num_attention_heads)
        packed = self.qkv_proj(hidden_states).unflatten(-1, (blocks, 3, -1, self.head_dim))
        query, value, key = (part.flatten(2, 3).transpose(1, 2) for part in packed.unbind(3))
        return query, key, value


def adapt_gptj(model: nn.Module) -> None:
    """Replace GPT-J's attention modules."""
    replace_all(model, "GPTJAttention", GptjAttention)


def adapt_codegen(model: nn.Module) -> None:
    """Replace CodeGen's attention modules."""
    replace_all(model, "CodeGenAttention", CodegenAttention)
