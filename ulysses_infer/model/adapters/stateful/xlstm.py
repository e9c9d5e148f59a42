"""xLSTM: its layers do not know their numbers, and its loop goes over chunks of one text."""

from __future__ import annotations

import sys
from typing import Any


def adapt_xlstm(model: Any) -> None:
    """Number the layers, and take a step's tokens, which are of several texts, as one chunk."""
    model.config.max_inference_chunksize = sys.maxsize
    for number, block in enumerate(model.backbone.blocks):
        block.mlstm_layer.layer_idx = number
