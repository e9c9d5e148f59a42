"""Kosmos-2.5 as a text model: positions are counted from the batch, and begin behind the padding token's."""

from __future__ import annotations

from torch import nn

from ulysses_infer.model.adapters.base import replace_all
from ulysses_infer.model.adapters.positions import StepEmbedding


def adapt_kosmos(model: nn.Module) -> None:
    """Replace the position embedding."""
    name = "Kosmos2_5TextSinusoidalPositionalEmbedding"
    replace_all(model, name, lambda source: StepEmbedding(source, source.padding_idx + 1))
