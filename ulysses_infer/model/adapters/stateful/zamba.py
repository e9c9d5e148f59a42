"""Zamba and Zamba 2: one block of attention and feed-forward serves several layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from ulysses_infer.model.adapters.base import AdaptedAttention
from ulysses_infer.model.injection.rules import AttentionRule, key_value_heads, query_heads

LOW_RANK: dict[str, AttentionRule] = {
    "linear_q_adapter_list": ("column", query_heads),
    "linear_k_adapter_list": ("column", key_value_heads),
    "linear_v_adapter_list": ("column", key_value_heads),
}
"""Lists of low-rank additions to the projections of a shared block, one per layer that it serves."""


class SharedAttention(AdaptedAttention):
    """transformers' attention, with the keys and values of one of the layers that share its weights."""

    def __init__(self, source: nn.Module, layer: int) -> None:
        super().__init__(source)
        self.layer_idx = layer
        self.forward_of_class = type(source).forward
        self.projections_elsewhere = tuple(
            (pair, "1", rule)
            for name, rule in LOW_RANK.items()
            for pair in getattr(self, name, ())
            if isinstance(pair, nn.Sequential)
        )

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """What transformers' attention computes."""
        return self.forward_of_class(self, *arguments, **options)


def adapt_zamba(model: Any) -> None:
    """Let every layer with a shared block cache its own keys and values."""
    for number, layer in enumerate(model.get_decoder().layers):
        block = getattr(layer, "shared_transformer", getattr(layer, "shared_transf", None))
        if block is not None:
            block.self_attn = SharedAttention(block.self_attn, number)
