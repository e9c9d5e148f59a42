"""BART and its relatives as decoders alone: without cross-attention, and with the positions of the step."""

from __future__ import annotations

from typing import Any

from ulysses_infer.model.adapters.base import SeparateAttention, replace_all
from ulysses_infer.model.adapters.positions import StepEmbedding


def adapt_decoder(model: Any) -> None:
    """Remove what reads an encoder."""
    decoder = model.get_decoder()
    decoder.embed_positions = StepEmbedding(decoder.embed_positions)
    for layer in decoder.layers:
        layer.self_attn.is_causal = True  # not marked so in all families
        del layer.encoder_attn, layer.encoder_attn_layer_norm
    model.config.num_hidden_layers = len(decoder.layers)  # for these types another name of encoder_layers


def adapt_mvp(model: Any) -> None:
    """The same, and attention that transformers computes in the module."""
    adapt_decoder(model)
    replace_all(model, "MvpAttention", SeparateAttention)
