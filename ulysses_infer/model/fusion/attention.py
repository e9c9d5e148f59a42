"""Fused attention blocks: projections, head norms, rotary embedding, attention, output projection."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.kernels.placement import HeadNorm, HeadTarget, HeadTemperature
from ulysses_infer.model.context import step_positions
from ulysses_infer.model.fusion.elementwise import Elementwise
from ulysses_infer.model.fusion.norm import FusedRMSNorm
from ulysses_infer.model.fusion.projections import (
    Inputs,
    Projection,
    children_with_weights,
    common_input_kind,
    find_linears,
    flat,
    has_own_weights,
    project,
)
from ulysses_infer.model.injection.rules import ATTENTION_OUTPUTS, KEY_NORMS, QUERY_NORMS, VALUE_NORMS
from ulysses_infer.model.layers.attention import attend_placed, attend_tokens
from ulysses_infer.model.layers.norm import ShardedRMSNorm

PROJECTION_NAMES = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
"""Names of the projections: query, key and value, or one packed projection."""


class FusedAttention(nn.Module):
    """llama's attention block, with optional norms of queries, keys and values.

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
        self._norms = [_child(source, names) for names in (QUERY_NORMS, KEY_NORMS, VALUE_NORMS)]

    @staticmethod
    def candidate(source: Any) -> bool:
        """Whether `source` has the weights of such a block and no others, and hands its keys to no other layer."""
        inputs, outputs = find_linears(source, PROJECTION_NAMES), _outputs(source)
        known = {*inputs, *outputs, *(_child(source, names) for names in (QUERY_NORMS, KEY_NORMS, VALUE_NORMS))}
        return (
            bool(inputs)
            and len(outputs) == 1
            and isinstance(getattr(source, "head_dim", None), int)
            and not getattr(source, "store_full_length_kv", False)
            and set(children_with_weights(source).values()) <= known
            and not has_own_weights(source)
        )

    @property
    def can_defer_sum(self) -> bool:
        """Whether it can leave the sum over the TP group to the caller."""
        has_partial: bool = self._output[0].has_partial
        return has_partial

    @property
    def input_kind(self) -> int:
        """See `QuantizedLinear.input_kind`."""
        return common_input_kind(self.inputs)

    def forward(
        self,
        hidden_states: Inputs,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        unsummed: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; position_embeddings: cosine and sine, [1, t, r]; returns ([1, t, D], None).

        unsummed: leave the sum over the TP group out.
        """
        query, key, value = (part.flatten(1) for part in project(self.inputs, flat(hidden_states)))
        query, key = self._heads(query, self._norms[0]), self._heads(key, self._norms[1])
        cosine, sine = position_embeddings
        query, key = self._elementwise.apply_rotary(query, key, cosine[0], sine[0])
        attended = self._attend(query, key, value)
        return self._projected(attended, unsummed)[None], None

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query: [t, Hq, d]; key: [t, Hkv, d]; value: [t, Hkv * d]; returns [t, Hq, d]."""
        values = self._heads(value, self._norms[2])
        return attend_tokens(self.layer_idx, self.head_plan, query, key, values, self.options)

    def _projected(self, attended: torch.Tensor, unsummed: bool) -> torch.Tensor:
        """attended: [t, H, d]; returns [t, D]."""
        (linear,) = self._output
        output: torch.Tensor = (linear.partial if unsummed else linear)(attended.flatten(1))
        return output

    def _heads(self, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        """x: [t, H * d]; returns [t, H, d], normalized per head, or over all heads together."""
        across = isinstance(norm, ShardedRMSNorm)
        if norm is not None and across:
            x = norm(x)
        x = x.view(x.shape[0], -1, self.head_dim)
        return x if norm is None or across else norm(x)


class GatedAttention(FusedAttention):
    """`FusedAttention` whose query projection has a gate beside each head, for the head's output (as in qwen3_next)."""

    def forward(
        self,
        hidden_states: Inputs,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        unsummed: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """See `FusedAttention.forward`."""
        both, key, value = (part.flatten(1) for part in project(self.inputs, flat(hidden_states)))
        query, gate = both.view(both.shape[0], -1, 2, self.head_dim).unbind(2)
        query, key = self._heads(query.flatten(1), self._norms[0]), self._heads(key, self._norms[1])
        cosine, sine = position_embeddings
        query, key = self._elementwise.apply_rotary(query, key, cosine[0], sine[0])
        attended = self._attend(query, key, value) * gate.sigmoid()
        return self._projected(attended, unsummed)[None], None


class PlacedAttention(FusedAttention):
    """`FusedAttention` with one Triton kernel for head norms, rotary embedding and the move of all heads.

    In full TP the kernel writes the cache, in SP the input of the all-to-all.
    """

    @staticmethod
    def candidate(source: Any) -> bool:
        """Whether it is such a block, with norms per head or none."""
        norms = (_child(source, QUERY_NORMS), _child(source, KEY_NORMS))
        return (
            FusedAttention.candidate(source)
            and all(norm is None or isinstance(norm, FusedRMSNorm) for norm in norms)
            and _child(source, VALUE_NORMS) is None
        )

    def forward(
        self,
        hidden_states: Inputs,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        unsummed: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """See `FusedAttention.forward`."""
        heads = project(self.inputs, flat(hidden_states))
        place = partial(self._place, heads, *self._rotation(position_embeddings))
        attended = attend_placed(self.layer_idx, self.head_plan, place, heads[0], self.head_dim, self.options)
        return self._projected(attended, unsummed)[None], None

    def _rotation(self, position_embeddings: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Cosine and sine as `place_heads` reads them."""
        cosine, sine = position_embeddings
        return cosine[0], sine[0]

    def _head_norms(self) -> tuple[HeadNorm | None, HeadNorm | None]:
        """Of query and key."""
        return _head_norm(self._norms[0]), _head_norm(self._norms[1])

    def _temperature(self) -> HeadTemperature | None:
        """Of the step's queries."""
        return None

    def _place(
        self,
        heads: list[torch.Tensor],
        cosine: torch.Tensor | None,
        sine: torch.Tensor | None,
        target: HeadTarget,
        query_index: torch.Tensor | None,
        index: torch.Tensor | None,
    ) -> None:
        """Implements `PlaceHeads`. heads: q, k, v, [t, shards, heads per shard * d]."""
        from ulysses_infer.kernels.heads import place_heads

        query, key, value = (each[: target.query.shape[0]] for each in heads)
        norms, temperature = self._head_norms(), self._temperature()
        place_heads(query, key, value, norms, cosine, sine, target, query_index, index, temperature)


class PairedAttention(PlacedAttention):
    """llama4's: layers rotate neighbours and then normalise, or only scale queries by their position."""

    def __init__(self, source: Any, options: AttentionOptions, elementwise: Elementwise) -> None:
        super().__init__(source, options, elementwise)
        norm = getattr(source, "qk_norm", None)
        self._rotates, self._norm = bool(source.use_rope), None if norm is None else HeadNorm(None, float(norm.eps))

    @staticmethod
    def candidate(source: Any) -> bool:
        """Whether it is such a block, with a norm without weights or none."""
        return PlacedAttention.candidate(source) and hasattr(source, "use_rope")

    def _rotation(self, position_embeddings: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """position_embeddings: complex numbers, [1, t, r / 2]."""
        return torch.view_as_real(position_embeddings)[0].flatten(1) if self._rotates else None, None

    def _head_norms(self) -> tuple[HeadNorm | None, HeadNorm | None]:
        return self._norm, self._norm

    def _temperature(self) -> HeadTemperature | None:
        temperature = self.head_plan.temperature
        if temperature is None:
            return None
        return HeadTemperature(step_positions(), temperature.length, temperature.strength)


def _head_norm(norm: Any) -> HeadNorm | None:
    return None if norm is None else HeadNorm(norm.weight, norm.eps)


def _outputs(source: nn.Module) -> list[Any]:
    return find_linears(source, tuple((name,) for name in ATTENTION_OUTPUTS))


def _child(source: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name, child in source.named_children() if name in names), None)
