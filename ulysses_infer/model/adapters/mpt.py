"""MPT: ALiBi, and attention computed in the module."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ulysses_infer.model.adapters.alibi import mpt_slopes
from ulysses_infer.model.adapters.base import Adapted, AdaptedAttention, replace_all


class MptAttention(AdaptedAttention):
    """q, k and v lie one after another, optionally clipped."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        self.register_buffer("slopes", mpt_slopes(self.n_heads), persistent=False)

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; returns ([1, t, D], None)."""
        packed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            packed = packed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        heads = map(self.heads, packed.chunk(3, dim=-1))
        return self.out_proj(self.attend(*heads, scaling=self.softmax_scale, alibi=self.slopes)), None


class MptLayers(Adapted):
    """The loop over layers, without the mask, which transformers' own loop requires, and without its biases."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, as transformers finds it."""
        embedding: nn.Module = self.wte
        return embedding

    def forward(self, input_ids: torch.Tensor, **_: Any) -> BaseModelOutputWithPast:
        """input_ids: [1, t]."""
        hidden = self.wte(input_ids)
        for block in self.blocks:
            hidden, _ = block(hidden, position_bias=None, attention_mask=None)
        return BaseModelOutputWithPast(last_hidden_state=self.norm_f(hidden))


def adapt_mpt(model: nn.Module) -> None:
    """Replace the attention modules and the loop."""
    replace_all(model, "MptAttention", MptAttention)
    replace_all(model, "MptModel", MptLayers)
