"""Fused gated feed-forward blocks."""

from __future__ import annotations

import torch
from torch import nn

from ulysses_infer.model.experts.products import SharedWeights
from ulysses_infer.model.fusion.elementwise import Elementwise
from ulysses_infer.model.fusion.projections import (
    Inputs,
    Projection,
    children_with_weights,
    common_input_kind,
    find_linears,
    flat,
    has_own_weights,
    input_kind,
    project,
)

PROJECTION_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("gate_up_proj", "down_proj"),
    ("Wi", "Wo"),
)
"""Names of the projections: gate, up (or both packed), down."""


class FusedFeedForward(nn.Module):
    """`down(activation(gate(x)) * up(x))`, with gate and up packed or separate."""

    def __init__(self, source: nn.Module, activation: str, elementwise: Elementwise) -> None:
        super().__init__()
        self.activation, self._elementwise = activation, elementwise
        for name, child in source.named_children():
            self.add_module(name, child)
        *inputs, down = find_linears(source, PROJECTION_NAMES)
        self.inputs: list[Projection] = inputs  # in lists, so that each is registered once, under its own name
        self._output = [down]

    @staticmethod
    def candidate(source: nn.Module) -> bool:
        """Whether `source` has the weights of such a block and no others, and no sparse activations (gemma3n)."""
        found = find_linears(source, PROJECTION_NAMES)
        is_whole = set(found) == set(children_with_weights(source).values()) and not has_own_weights(source)
        return bool(found) and is_whole and not getattr(source, "activation_sparsity", 0.0)

    @property
    def input_kind(self) -> int:
        """See `QuantizedLinear.input_kind`."""
        return common_input_kind(self.inputs)

    @property
    def can_defer_sum(self) -> bool:
        """Whether it can leave the sum over the TP group to the caller."""
        has_partial: bool = self._output[0].has_partial
        return has_partial

    def forward(self, hidden_states: Inputs, unsummed: bool = False) -> torch.Tensor:
        """hidden_states: [..., t, D]; returns the same shape. unsummed: leave the sum over the TP group out."""
        gate, up = project(self.inputs, flat(hidden_states))
        (down,) = self._output
        active = self._elementwise.gated_shards(self.activation, gate, up, input_kind(down))
        output: torch.Tensor = down.partial(active) if unsummed else down(active)
        return output.view(*hidden_states.shape[:-1], output.shape[-1])

    def weights(self) -> SharedWeights | None:
        """See `SharedExpert.weights`."""
        (down,) = self._output
        parts = [part for projection in self.inputs for part in projection.dense_parts()]
        row = down.dense_row()
        if len(parts) != 2 or row is None:
            return None
        gate, up = parts
        return SharedWeights(self.activation, gate, up, row)
