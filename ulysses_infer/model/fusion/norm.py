"""Fused RMS norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.kernels.scaled_rows import NONE, QuantisedRows
from ulysses_infer.model.fusion.elementwise import Elementwise, NativeElementwise
from ulysses_infer.model.layers.norm import PerHeadNorm, ShardedRMSNorm


class FusedRMSNorm(nn.Module):
    """`weight * x / rms(x)`, with `x / rms(x)` rounded to the dtype of x before the product (as in llama)."""

    def __init__(self, source: Any, elementwise: Elementwise) -> None:
        super().__init__()
        self.weight = source.weight
        self.eps = _epsilon(source)
        self._elementwise = elementwise

    @staticmethod
    def candidate(source: Any) -> bool:
        """Whether `source` has the weight of such a norm and no others."""
        own = dict(source.named_parameters())
        return (
            list(own) == ["weight"]
            and own["weight"].dim() == 1
            and _epsilon(source) is not None
            and not isinstance(source, ShardedRMSNorm | PerHeadNorm)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: [..., D]; returns the same shape."""
        return self._elementwise.rms_norm(hidden_states, self.weight, self.eps)

    def add_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor, kind: int = NONE
    ) -> tuple[torch.Tensor, torch.Tensor | QuantisedRows]:
        """See `Elementwise.add_rms_norm`."""
        return self._elementwise.add_rms_norm(x, residual, self.weight, self.eps, kind)


class OffsetRMSNorm(FusedRMSNorm):
    """`(1 + weight) * x / rms(x)`, rounded once at the end (as in gemma), in C on a CPU."""

    _elementwise: NativeElementwise

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """See `FusedRMSNorm.forward`."""
        return self._elementwise.rms_norm(hidden_states, self.weight, self.eps, offset=1.0)

    def add_and_norm(
        self, x: torch.Tensor, residual: torch.Tensor, kind: int = NONE
    ) -> tuple[torch.Tensor, torch.Tensor | QuantisedRows]:
        """See `FusedRMSNorm.add_and_norm`."""
        return self._elementwise.add_rms_norm(x, residual, self.weight, self.eps, offset=1.0)


def _epsilon(source: Any) -> Any:
    return getattr(source, "variance_epsilon", None) or getattr(source, "eps", None)
