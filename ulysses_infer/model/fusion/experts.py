"""Fused parts of mixtures of experts on a GPU: the router, and the gate between the two products of an expert."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ulysses_infer.model.experts.layer import ExpertLayer
from ulysses_infer.model.fusion.elementwise import ACTIVATIONS, Elementwise
from ulysses_infer.model.fusion.equivalence import is_close
from ulysses_infer.model.layers.matmul import linear

TRIAL = (4, 64)
"""Rows and columns on which gates are compared."""


class FusedRouter(nn.Module):
    """The `top_k` likeliest experts by a softmax over all; `normalise`: their probabilities sum to 1."""

    def __init__(self, source: Any, normalise: bool) -> None:
        super().__init__()
        self.weight, self.top_k, self.normalise = source.weight, source.top_k, normalise

    @staticmethod
    def candidate(source: Any) -> bool:
        """Whether `source` has the weight of such a router and no others, and a `top_k` that the kernel takes."""
        own, top_k = dict(source.named_parameters()), getattr(source, "top_k", None)
        return (
            list(own) == ["weight"] and own["weight"].dim() == 2 and isinstance(top_k, int) and top_k.bit_count() == 1
        )

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden_states: [..., D]; returns logits [t, E], probabilities [t, K] and experts [t, K]."""
        from ulysses_infer.kernels.routing import choose

        logits = linear(hidden_states.flatten(0, -2), self.weight)
        return logits, *choose(logits, self.top_k, self.normalise)


def fuse_gate(layer: ExpertLayer, elementwise: Elementwise, dtype: torch.dtype, device: torch.device) -> bool:
    """Let `layer` compute its gate by `elementwise`, if that is equal to the model's own; returns whether it is."""
    weights = layer.weights
    if not (weights.module.has_gate and weights.module.is_concatenated):
        return False
    up = torch.linspace(-4.0, 4.0, TRIAL[0] * 2 * TRIAL[1], device=device).view(TRIAL[0], -1).to(dtype)
    expected = weights.apply_gate(up * 3.0)  # large enough for limits to show
    for name in ACTIVATIONS:
        gate = partial(_gated, elementwise, name)
        if is_close(gate(*(up * 3.0).chunk(2, dim=-1)), expected):
            weights.gate = gate
            return True
    return False


def _gated(elementwise: Elementwise, activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up: [S, I], with dense rows; returns [S, I]."""
    output = elementwise.gated_shards(activation, gate[:, None], up[:, None])
    assert isinstance(output, torch.Tensor)
    return output
