"""GPT-BigCode (StarCoder): its packed projection has another layout without multi-query attention."""

from __future__ import annotations

from typing import Any

from ulysses_infer.model.injection.rules import query_heads


def adapt_gpt_bigcode(model: Any) -> None:
    """Without multi-query attention, q, k and v of each head lie next to each other."""
    if not model.config.multi_query:
        for block in model.transformer.h:
            block.attn.attention_rules = {"c_attn": ("column", query_heads)}
