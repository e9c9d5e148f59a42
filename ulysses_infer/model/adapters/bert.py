"""BERT and its descendants as decoders (`is_decoder: true`): inputs and outputs of attention are in two modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.adapters.base import AdaptedAttention
from ulysses_infer.model.adapters.positions import OffsetEmbedding, StepEmbedding
from ulysses_infer.model.adapters.rotary import rotate_pairs
from ulysses_infer.model.injection.rules import AttentionRule, key_value_heads, query_heads

RULES: dict[str, AttentionRule] = {
    "query": ("column", query_heads),
    "key": ("column", key_value_heads),
    "value": ("column", key_value_heads),
}


class BertAttention(AdaptedAttention):
    """Up to the output projection, which is `dense` of the module `output`."""

    def __init__(self, source: nn.Module, output: nn.Module) -> None:
        super().__init__(source)
        self.attention_rules, self.projections_elsewhere = RULES, ((output, "dense", ("row", query_heads)),)
        self.head_dim, self.is_causal = self.attention_head_size, getattr(source, "is_decoder", True)

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; returns ([1, t, Hq/tp * d], None)."""
        query, key, value = (self.heads(each(hidden_states)) for each in (self.query, self.key, self.value))
        return self.attend(query, key, value), None


class RoformerAttention(BertAttention):
    """Rotates queries and keys, and, if so configured, values."""

    def forward(
        self, hidden_states: torch.Tensor, *_: Any, sinusoidal_pos: torch.Tensor, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; sinusoidal_pos: sine and cosine, [..., t, d]; returns as `BertAttention`."""
        query, key, value = (self.heads(each(hidden_states)) for each in (self.query, self.key, self.value))
        sine, cosine = sinusoidal_pos.flatten(0, -3).chunk(2, dim=-1)
        query, key = (rotate_pairs(each, cosine, sine) for each in (query, key))
        return self.attend(query, key, rotate_pairs(value, cosine, sine) if self.rotary_value else value), None


def adapt_bert(model: Any) -> None:
    """Replace the attention modules; count RoBERTa's positions from behind its padding token."""
    _replace_attention(model, BertAttention)
    for module in model.modules():
        if hasattr(module, "position_embeddings") and hasattr(module, "padding_idx"):
            offset = module.padding_idx + 1
            module.position_embeddings = OffsetEmbedding(module.position_embeddings, offset)
            model.config.max_position_embeddings -= offset  # the longest text


def adapt_big_bird(model: Any) -> None:
    """The same, for full attention."""
    if model.config.attention_type != "original_full":
        raise UnsupportedModelError("BigBird is served with attention_type original_full only")
    adapt_bert(model)


def adapt_roformer(model: Any) -> None:
    """Replace the attention modules and the table of sines and cosines."""
    _replace_attention(model, RoformerAttention)
    encoder = model.base_model.encoder
    encoder.embed_positions = StepEmbedding(encoder.embed_positions)


def _replace_attention(model: nn.Module, kind: type[BertAttention]) -> None:
    for module in list(model.modules()):
        parts = dict(module.named_children())
        if type(parts.get("self")).__name__.endswith("SelfAttention"):
            module.self = kind(parts["self"], parts["output"])
