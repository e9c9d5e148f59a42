"""CTRL: other names of the projections."""

from __future__ import annotations

from typing import Any

from ulysses_infer.model.injection.rules import key_value_heads, query_heads


def adapt_ctrl(model: Any) -> None:
    """Say what is what."""
    inputs = {"Wq": query_heads, "Wk": key_value_heads, "Wv": key_value_heads}
    for layer in model.transformer.h:
        layer.multi_head_attention.attention_rules = {name: ("column", rule) for name, rule in inputs.items()}
