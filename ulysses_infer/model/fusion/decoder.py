"""The fused layer loop: each residual addition is combined with the norm that follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ulysses_infer.model.fusion.elementwise import Elementwise
from ulysses_infer.model.fusion.norm import FusedRMSNorm
from ulysses_infer.model.fusion.projections import children_with_weights, input_kind

LAYER_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
BASE_PARTS = ("embed_tokens", "layers", "norm")


@dataclass(frozen=True)
class _DecoderLayer:
    attention: nn.Module
    attention_norm: FusedRMSNorm
    feed_forward: nn.Module
    next_norm: FusedRMSNorm  # of the next layer, or the last one
    next_attention: nn.Module | None  # reads it; None: the head does


class FusedDecoder:
    """llama's decoder: embedding, pre-norm layers, final norm, head. It runs the modules of the model."""

    def __init__(self, base: Any, head: nn.Module, rotary: nn.Module, elementwise: Elementwise) -> None:
        """`rotary`: the rotary embedding of `base`, or its fused form."""
        self.embedding, self.rotary, self.head = base.embed_tokens, rotary, head
        self._elementwise = elementwise
        self.first_norm: FusedRMSNorm = base.layers[0].input_layernorm
        following = [*((layer.input_layernorm, layer.self_attn) for layer in base.layers[1:]), (base.norm, None)]
        self.layers = [
            _DecoderLayer(layer.self_attn, layer.post_attention_layernorm, layer.mlp, norm, attention)
            for layer, (norm, attention) in zip(base.layers, following, strict=True)
        ]

    @staticmethod
    def candidate(base: Any) -> bool:
        """Whether `base`, a model without its head, has exactly these parts."""
        if set(children_with_weights(base)) != set(BASE_PARTS) or not hasattr(base, "rotary_emb"):
            return False
        norms = [base.norm]
        for layer in base.layers:
            if set(children_with_weights(layer)) != set(LAYER_PARTS):
                return False
            norms += [layer.input_layernorm, layer.post_attention_layernorm]
        return all(isinstance(norm, FusedRMSNorm) for norm in norms)

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, logits_rows: torch.Tensor) -> torch.Tensor:
        """input_ids, positions: [t]; logits_rows: indices into them; returns [n, V/W] as `ShiftModel.forward`."""
        residual = self._embedded(input_ids)[None]
        position_ids = positions[None]
        rotary = self.rotary(residual, position_ids)
        normed = self.first_norm(residual)
        for layer in self.layers:
            attended, _ = layer.attention(
                hidden_states=normed,
                position_embeddings=rotary,
                attention_mask=None,
                position_ids=position_ids,
                past_key_values=None,
                use_cache=False,
            )
            residual, normed = layer.attention_norm.add_and_norm(attended, residual, input_kind(layer.feed_forward))
            output = layer.feed_forward(normed)
            residual, normed = layer.next_norm.add_and_norm(output, residual, input_kind(layer.next_attention))
        if len(logits_rows) < normed.shape[1]:  # ascending and distinct: skip the selection if it is all rows
            normed = normed.index_select(1, logits_rows)
        logits: torch.Tensor = self.head(normed)[0]
        return logits

    def _embedded(self, input_ids: torch.Tensor) -> torch.Tensor:
        if type(self.embedding) is nn.Embedding:  # other classes may scale the embedding
            return self._elementwise.embed(input_ids, self.embedding.weight)
        embedded: torch.Tensor = self.embedding(input_ids)
        return embedded
