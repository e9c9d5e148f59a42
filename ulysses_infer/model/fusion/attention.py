"""Fused attention blocks: projections, head norms, rotary embedding, attention, output projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.model.fusion.elementwise import Elementwise
from ulysses_infer.model.fusion.projections import (
    Projection,
    children_with_weights,
    find_linears,
    has_own_weights,
    project,
)
from ulysses_infer.model.injection.rules import ATTENTION_OUTPUTS, KEY_NORMS, QUERY_NORMS
from ulysses_infer.model.layers.attention import attend_tokens
from ulysses_infer.model.layers.norm import ShardedRMSNorm

PROJECTION_NAMES = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
"""Names of the projections: query, key and value, or one packed projection."""


class FusedAttention(nn.Module):
    """llama's attention block, with optional query and key norms.

    `options` (scaling, window) are those recorded from `source`'s own forward.
    """

    def __init__(self, source: Any, options: AttentionOptions, elementwise: Elementwise) -> None:
        super().__init__()
        self.layer_idx, self.head_plan, self.options = source.layer_idx, source.head_plan, options
        self.head_dim = source.head_dim
        self._elementwise = elementwise
        for name, child in source.named_children():
            self.add_module(name, child)
        self.inputs: list[Projection] = find_linears(
            source, PROJECTION_NAMES
        )  # in a list, so that each is registered once
        self._output = _outputs(source)
        self._norms = [_child(source, QUERY_NORMS), _child(source, KEY_NORMS)]

    @staticmethod
    def candidate(source: Any) -> bool:
        """Whether `source` has the weights of such a block and no others."""
        inputs, outputs = find_linears(source, PROJECTION_NAMES), _outputs(source)
        known = {*inputs, *outputs, _child(source, QUERY_NORMS), _child(source, KEY_NORMS)}
        return (
            bool(inputs)
            and len(outputs) == 1
            and isinstance(getattr(source, "head_dim", None), int)
            and set(children_with_weights(source).values()) <= known
            and not has_own_weights(source)
        )

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **_: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; position_embeddings: cosine and sine, [1, t, r]; returns ([1, t, D], None)."""
        query, key, value = project(self.inputs, hidden_states[0])
        query, key = self._heads(query, self._norms[0]), self._heads(key, self._norms[1])
        cosine, sine = position_embeddings
        query, key = self._elementwise.apply_rotary(query, key, cosine[0], sine[0])
        attended = attend_tokens(
            self.layer_idx, self.head_plan, query, key, value.view(value.shape[0], -1, self.head_dim), self.options
        )
        (output,) = self._output
        return output(attended.flatten(1))[None], None

    def _heads(self, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        """x: [t, H * d]; returns [t, H, d], normalized per head, or over all heads together."""
        across = isinstance(norm, ShardedRMSNorm)
        if norm is not None and across:
            x = norm(x)
        x = x.view(x.shape[0], -1, self.head_dim)
        return x if norm is None or across else norm(x)


def _outputs(source: nn.Module) -> list[Any]:
    return find_linears(source, tuple((name,) for name in ATTENTION_OUTPUTS))


def _child(source: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name, child in source.named_children() if name in names), None)
