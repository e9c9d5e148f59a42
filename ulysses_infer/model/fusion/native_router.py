"""Routers of mixtures of experts on a CPU: the choice of experts in one native call."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import nn

from ulysses_infer.model.layers.matmul import linear
from ulysses_infer.native.library import is_available
from ulysses_infer.native.routing import MOST_EXPERTS, RoutingRule, choose, wide_logits

CORRECTION = "e_score_correction_bias"
"""What transformers calls a bias of the scores that are compared."""
FACTORS = (1.0, 3.0, 0.02)
"""Of trial inputs: large ones would make sigmoids equal, and then any choice is right."""
MOST_WIDE_ROWS = 64
"""Of larger steps torch's product of converted operands is faster."""


class NativeRouter(nn.Module):
    """The best experts of each token by `rule`.

    is_wide: logits are computed and returned in float32; dtype: of the weights.
    """

    def __init__(self, source: Any, rule: RoutingRule, is_wide: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self.top_k = source.weight, int(source.top_k)
        self.bias = getattr(source, "bias", None)
        self.rule, self.is_wide, self.dtype = rule, is_wide, dtype
        self.register_buffer(CORRECTION, getattr(source, CORRECTION, None))

    @staticmethod
    def candidate(source: Any) -> bool:
        """Whether `source` has the weights of such a router and no others."""
        own, buffers = dict(source.named_parameters()), dict(source.named_buffers())
        if not own.keys() <= {"weight", "bias"} or not buffers.keys() <= {CORRECTION}:
            return False
        if not isinstance(getattr(source, "top_k", None), int) or "weight" not in own or own["weight"].dim() != 2:
            return False
        correction = buffers.get(CORRECTION)
        is_known = correction is None or (correction.dtype == torch.float32 and correction.is_contiguous())
        return is_known and source.top_k <= len(own["weight"]) <= MOST_EXPERTS and is_available("routing")

    @staticmethod
    def forms(source: Any, dtype: torch.dtype) -> Iterator[NativeRouter]:
        """Routers with the weights of `source`, in a model of `dtype`, one of which may compute the same."""
        groups = int(getattr(source, "num_group", None) or getattr(source, "n_group", None) or 1)
        kept = int(getattr(source, "topk_group", None) or 1)
        scale = float(getattr(source, "routed_scaling_factor", None) or 1.0)
        kinds = [(True, torch.float32), (False, dtype), (False, torch.float32), (True, dtype)]
        scores = product((False, True), repeat=2)
        sizes = (2, 1) if 1 < groups <= len(source.weight) and len(source.weight) % groups == 0 else (0,)
        for (sigmoid, normalise), best, (is_wide, weights) in product(scores, sizes, kinds):
            rule = RoutingRule(sigmoid, normalise, groups if best else 0, kept, best, scale)
            yield NativeRouter(source, rule, is_wide, weights)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """hidden_states: [..., D]; returns logits [t, E], weights [t, K] and experts [t, K] int64."""
        logits = self._logits(hidden_states.flatten(0, -2))
        return logits, *choose(logits, self.top_k, self.rule, self.get_buffer(CORRECTION), self.dtype)

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: [t, D]; returns [t, E]."""
        if not self.is_wide or (tokens.dtype == self.weight.dtype == torch.float32):
            return linear(tokens, self.weight, self.bias)
        dense = tokens.stride(1) == self.weight.stride(1) == 1 and self.bias is None
        if dense and tokens.dtype == self.weight.dtype and len(tokens) <= MOST_WIDE_ROWS:
            return wide_logits(tokens, self.weight)
        bias = None if self.bias is None else self.bias.float()
        return linear(tokens.float(), self.weight.float(), bias)
