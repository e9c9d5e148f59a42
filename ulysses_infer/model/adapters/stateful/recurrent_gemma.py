"""RecurrentGemma: its recurrent blocks do not know the number of their layer."""

from __future__ import annotations

from typing import Any


def adapt_recurrent_gemma(model: Any) -> None:
    """Number the blocks."""
    for number, layer in enumerate(model.get_decoder().layers):
        layer.temporal_block.layer_idx = number
