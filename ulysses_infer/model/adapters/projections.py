"""Families that attend as others do, with projections of other names, in other layouts or inside wrappers."""

from __future__ import annotations

from typing import Any

from ulysses_infer.model.injection.rules import ATTENTION_RULES, key_value_heads, query_heads


def adapt_gpt_bigcode(model: Any) -> None:
    """StarCoder without multi-query attention: q, k and v of each head lie next to each other."""
    if not model.config.multi_query:
        for block in model.transformer.h:
            block.attn.attention_rules = {"c_attn": ("column", query_heads)}


def adapt_ctrl(model: Any) -> None:
    """CTRL: other names."""
    inputs = {"Wq": query_heads, "Wk": key_value_heads, "Wv": key_value_heads}
    for layer in model.transformer.h:
        layer.multi_head_attention.attention_rules = {name: ("column", rule) for name, rule in inputs.items()}


def adapt_moshi(model: Any) -> None:
    """Moshi's text model: linear layers inside wrappers."""
    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        attention.projections_elsewhere = tuple(
            (wrapper, "linear", ATTENTION_RULES[name])
            for name, wrapper in attention.named_children()
            if name in ATTENTION_RULES
        )
