"""Position embeddings that models count from the batch, or from an offset, as functions of the step's positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ulysses_infer.model.adapters.base import Adapted
from ulysses_infer.model.context import step_positions


class OffsetEmbedding(Adapted):
    """An embedding of positions whose first rows are not positions (RoBERTa: up to the padding token's)."""

    def __init__(self, source: nn.Module, offset: int) -> None:
        super().__init__(source)
        self.offset = offset

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """positions: [1, t]; returns [1, t, D]."""
        return F.embedding(positions + self.offset, self.weight)


class StepEmbedding(Adapted):
    """An embedding of the step's positions, whatever the model gives it: token ids, shapes, past lengths."""

    def __init__(self, source: nn.Module, offset: int | None = None) -> None:
        super().__init__(source)
        self.offset = getattr(source, "offset", 0) if offset is None else offset
        self.table = "weight" if hasattr(source, "weight") else "weights"

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """Returns [1, t, D]."""
        return F.embedding(step_positions()[None] + self.offset, getattr(self, self.table))
