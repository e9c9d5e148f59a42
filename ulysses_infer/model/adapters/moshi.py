"""Moshi's text model: the projections are inside wrappers."""

from __future__ import annotations

from typing import Any

from ulysses_infer.model.injection.rules import ATTENTION_RULES


def adapt_moshi(model: Any) -> None:
    """Say where the projections are."""
    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        attention.projections_elsewhere = tuple(
            (wrapper, "linear", ATTENTION_RULES[name])
            for name, wrapper in attention.named_children()
            if name in ATTENTION_RULES
        )
