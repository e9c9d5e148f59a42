"""`ShiftLinear`: one stored slice of a linear layer, read differently in each mode."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from ulysses_infer.model.context import step_context
from ulysses_infer.parallel.layout import Place, Span
from ulysses_infer.parallel.sharding import Sharding

Cut = Literal["column", "row"]


class ShiftLinear(nn.Module):
    """A linear layer that keeps its base slice once and gives every mode zero-copy views of it.

    A `column` cut shards the output features (rows of the weight): `[t, in] -> [t, out / tp]`.
    A `row` cut shards the input features: `[t, in / tp] -> [t, out]`, summed over the TP group; its bias is added
    once, after the sum. The paper keeps a second copy of the weights for its second mode (§3.2); this keeps none.
    """

    def __init__(self, source: nn.Linear, cut: Cut, sharding: Sharding, base: Place) -> None:
        super().__init__()
        self.cut, self.sharding, self.base = cut, sharding, base
        stored = sum(span.size for span in sharding.base_spans(base))
        shape = (stored, source.in_features) if cut == "column" else (source.out_features, stored)
        self.weight = nn.Parameter(source.weight.new_empty(shape), requires_grad=False)
        bias_size = stored if cut == "column" else source.out_features
        has_bias = source.bias is not None
        self.bias = nn.Parameter(source.bias.new_empty(bias_size), requires_grad=False) if has_bias else None
        self._pieces: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def slices(self, name: str) -> tuple[int, list[Span]] | None:
        """Which part of the full parameter `name` this rank keeps: (dimension, spans), None for all of it."""
        if self.cut == "row":
            return (1, self.sharding.base_spans(self.base)) if name == "weight" else None
        return 0, self.sharding.base_spans(self.base)

    def bind(self, place: Place) -> None:
        """Read the weight as `place` needs it from now on. Views only; nothing is copied."""
        spans = self.sharding.local_spans(self.base, place)
        self._pieces = [self._piece(span) for span in spans]

    def _piece(self, span: Span) -> tuple[torch.Tensor, torch.Tensor | None]:
        dimension = 0 if self.cut == "column" else 1
        weight = self.weight.detach().narrow(dimension, span.start, span.size)
        if self.cut == "row" or self.bias is None:
            return weight, None
        return weight, self.bias.detach().narrow(0, span.start, span.size)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: [..., in features of the mode]; returns [..., out features of the mode]."""
        if self.cut == "row":
            return self._forward_row(inputs)
        if len(self._pieces) == 1:
            return F.linear(inputs, *self._pieces[0])
        return torch.cat([F.linear(inputs, weight, bias) for weight, bias in self._pieces], dim=-1)

    def _forward_row(self, inputs: torch.Tensor) -> torch.Tensor:
        (weight, _), = self._pieces  # fmt: skip
        output = step_context().collectives.sum_over_tp(F.linear(inputs, weight))
        return output if self.bias is None else output.add_(self.bias)
