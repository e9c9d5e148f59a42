"""Llama 3.2 Vision as a text model: without an image, transformers skips the layers that attend to one."""

from __future__ import annotations

from typing import Any

from torch import nn


def adapt_mllama(model: Any) -> None:
    """Remove the layers that are skipped; the others keep their numbers."""
    for index in model.cross_attention_layers:
        model.layers[index] = nn.Identity()
