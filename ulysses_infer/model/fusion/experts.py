"""Fused parts of mixtures of experts on a GPU: the router, and the gate between the two products of an expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ulysses_infer.model.experts.layer import ExpertLayer
from ulysses_infer.model.experts.routed import Packing, Routed
from ulysses_infer.model.fusion.elementwise import ACTIVATIONS, Elementwise
from ulysses_infer.model.fusion.equivalence import is_close
from ulysses_infer.model.layers.matmul import linear

if TYPE_CHECKING:
    from ulysses_infer.kernels.router import Score

SCORES: tuple[Score, ...] = ("normalised softmax", "softmax", "sigmoid")
TRIAL = (4, 64)
"""Rows and columns on which gates are compared."""


class FusedRouter(nn.Module):
    """The `top_k` likeliest experts, with weights of the kind `score`."""

    def __init__(self, source: Any, score: Score) -> None:
        super().__init__()
        self.weight, self.top_k, self.score = source.weight, int(source.top_k), score

    @staticmethod
    def candidate(source: Any) -> bool:
        """Whether `source` has the weight of such a router and no others."""
        own = dict(source.named_parameters())
        return list(own) == ["weight"] and own["weight"].dim() == 2 and isinstance(getattr(source, "top_k", None), int)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden_states: [..., D]; returns logits [t, E], probabilities [t, K] and experts [t, K] int64."""
        routed, logits = self.route(hidden_states.flatten(0, -2))
        return logits, routed.torch_weights, routed.experts.long()

    def route(self, tokens: torch.Tensor, scale: bool = False, packs: bool = False) -> tuple[Routed, torch.Tensor]:
        """tokens: [t, D]; returns them with their experts, and logits [t, E].

        scale: multiplied by the weight of their only expert. packs: as one message.
        """
        from ulysses_infer.kernels.router import Choices, can_route, choose, route

        if not can_route(len(tokens), len(self.weight)):
            logits = linear(tokens, self.weight)
            found = choose(logits, self.top_k, self.score)
            if scale:
                return Routed(tokens * found.weights, found.experts, None), logits
            return Routed(tokens, found.experts, found.weights), logits
        if packs:
            packing = Packing(tokens.shape[1], self.top_k, tokens.dtype)
            packed = packing.empty(len(tokens), tokens.device)
            hidden, weights, experts = packing.views(packed)
            logits, _ = route(tokens, self.weight, self.top_k, self.score, Choices(weights, experts), hidden, scale)
            return Routed(hidden, experts, None if scale else weights, tokens.dtype, packed), logits
        scaled = torch.empty_like(tokens) if scale else None
        logits, found = route(tokens, self.weight, self.top_k, self.score, None, scaled, scale)
        if scaled is not None:
            return Routed(scaled, found.experts, None), logits
        return Routed(tokens, found.experts, found.weights), logits


def dense_choices(router: nn.Module) -> Callable[..., Any]:
    """`router` with the weight of every expert, [t, E], for its choices: of weight 0, any may be chosen."""

    def run(*args: Any, **kwargs: Any) -> Any:
        outputs = router(*args, **kwargs)
        if not isinstance(outputs, tuple) or len(outputs) != 3:
            return outputs
        logits, weights, experts = outputs
        return logits, weights, weights.new_zeros(logits.shape).scatter(1, experts, weights)

    return run


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
            weights.gate, weights.activation = gate, name
            return True
    return False


def _gated(elementwise: Elementwise, activation: str, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up: [S, I], with dense rows; returns [S, I]."""
    output = elementwise.gated_shards(activation, gate[:, None], up[:, None])
    assert isinstance(output, torch.Tensor)
    return output
