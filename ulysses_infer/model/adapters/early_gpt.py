"""GPT, GPT-Neo and GPT-NeoX Japanese: attention computed in the module, with a mask of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.model.adapters.base import AdaptedAttention, replace_all
from ulysses_infer.model.adapters.rotary import rotate_halves


class GptAttention(AdaptedAttention):
    """The first GPT's: q, k and v lie one after another in a transposed weight."""

    def __init__(self, source: nn.Module, layer: int) -> None:
        super().__init__(source)
        self.layer_idx, self.head_dim = layer, self.split_size // self.n_head
        del self.bias  # the mask

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> list[torch.Tensor]:
        """x: [1, t, D]; returns a list of [1, t, D]."""
        heads = map(self.heads, self.c_attn(x).split(self.split_size, dim=-1))
        return [self.c_proj(self.attend(*heads))]


def adapt_gpt(model: Any) -> None:
    """Replace the attention modules, which do not know their layers."""
    for layer, block in enumerate(model.transformer.h):
        block.attn = GptAttention(block.attn, layer)


class GptNeoAttention(AdaptedAttention):
    """GPT-Neo's: scores are not scaled, and every other layer has a sliding window."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        self.layer_idx = self.layer_id
        self.window = self.config.window_size if self.attention_type == "local" else None
        del self.bias  # the mask

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; returns ([1, t, D], None)."""
        heads = (self.heads(each(hidden_states)) for each in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(self.attend(*heads, scaling=1.0, sliding_window=self.window)), None


def adapt_gpt_neo(model: nn.Module) -> None:
    """Replace the attention modules."""
    replace_all(model, "GPTNeoSelfAttention", GptNeoAttention)


class GptNeoxJapaneseAttention(AdaptedAttention):
    """q, k and v of each head lie next to each other; the last layer's output has a bias, which the caller adds."""

    replicated_parameters = ("dense_bias",)

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        self.head_dim = self.head_size

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        """hidden_states: [1, t, D]; position_embeddings: cosine and sine; returns ([1, t, D], None, bias)."""
        packed = self.query_key_value(hidden_states).unflatten(-1, (-1, 3, self.head_dim))
        query, key, value = (part.transpose(1, 2) for part in packed.unbind(-2))
        query, key = (rotate_halves(each, *position_embeddings) for each in (query, key))
        return self.dense(self.attend(query, key, value)), None, self.dense_bias


def adapt_gpt_neox_japanese(model: nn.Module) -> None:
    """Replace the attention modules."""
    replace_all(model, "GPTNeoXJapaneseAttention", GptNeoxJapaneseAttention)
