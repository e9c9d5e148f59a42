"""The fused layer loop: each residual addition is combined with the norm that follows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ulysses_infer.kernels.scaled_rows import QuantisedRows
from ulysses_infer.model.context import step_context
from ulysses_infer.model.fusion.elementwise import Elementwise
from ulysses_infer.model.fusion.norm import FusedRMSNorm
from ulysses_infer.model.fusion.projections import children_with_weights, input_kind
from ulysses_infer.model.hidden_states import HiddenStates

LAYER_PARTS = {"input_layernorm", "post_attention_layernorm"}
MIXERS = ("self_attn", "linear_attn")
"""Names of attention and of recurrent layers; each layer has one of them."""
FEED_FORWARDS = ("mlp", "feed_forward", "block_sparse_moe")
"""Names of the last part of a layer; each layer has one of them, and `LAYER_PARTS`."""
BASE_PARTS = ("embed_tokens", "layers", "norm")


@dataclass(frozen=True)
class _Block:
    """Attention, a recurrent layer or feed-forward, and the norm after it."""

    module: nn.Module
    norm: FusedRMSNorm
    reader: nn.Module | None  # of the norm; None: the head

    def add_and_norm(
        self, output: torch.Tensor, residual: torch.Tensor, unsummed: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | QuantisedRows]:
        """The new residual and its norm, both [1, t, D]. unsummed: `output` is still to be summed over the TP group."""
        kind = input_kind(self.reader)
        if unsummed:
            return step_context().collectives.sum_add_norm(output, residual, self.norm, kind)
        return self.norm.add_and_norm(output, residual, kind)

    @cached_property
    def options(self) -> dict[str, bool]:
        """Arguments of the module: whether it leaves its sum over the TP group to the norm."""
        return {"unsummed": True} if getattr(self.module, "can_defer_sum", False) else {}


class FusedDecoder:
    """llama's decoder: embedding, pre-norm layers, final norm, head. It runs the modules of the model."""

    def __init__(self, base: Any, head: nn.Module, rotary: nn.Module, elementwise: Elementwise) -> None:
        """`rotary`: the rotary embedding of `base`, or its fused form."""
        self.embedding, self.rotary, self.head = base.embed_tokens, rotary, head
        self._elementwise = elementwise
        self.kept: HiddenStates | None = None
        """Where hidden states are kept for a head that drafts; None: nothing is kept."""
        self.first_norm: FusedRMSNorm = base.layers[0].input_layernorm
        parts = [(_part(layer, MIXERS), _part(layer, FEED_FORWARDS)) for layer in base.layers]
        readers = zip(base.layers[1:], parts[1:], strict=True)
        following = [*((layer.input_layernorm, mixer) for layer, (mixer, _) in readers), (base.norm, None)]
        self.layers = [
            (_Block(mixer, layer.post_attention_layernorm, last), _Block(last, norm, reader))
            for layer, (mixer, last), (norm, reader) in zip(base.layers, parts, following, strict=True)
        ]

    @staticmethod
    def candidate(base: Any) -> bool:
        """Whether `base`, a model without its head, has exactly these parts."""
        if set(children_with_weights(base)) != set(BASE_PARTS) or not hasattr(base, "rotary_emb"):
            return False
        norms = [base.norm]
        for layer in base.layers:
            found = set(children_with_weights(layer))
            if not any(found == {*LAYER_PARTS, mixer, last} for mixer in MIXERS for last in FEED_FORWARDS):
                return False
            norms += [layer.input_layernorm, layer.post_attention_layernorm]
        return all(isinstance(norm, FusedRMSNorm) for norm in norms)

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, logits_rows: torch.Tensor) -> torch.Tensor:
        """input_ids, positions: [t]; logits_rows: indices into them; returns [n, V/W] as `ShiftModel.forward`."""
        return self.logits(self.hidden(input_ids, positions), logits_rows)

    def hidden(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """input_ids, positions: [t]; returns what the head reads, [t, D]."""
        residual = self._embedded(input_ids)[None]
        position_ids = positions[None]
        rotary = self.rotary(residual, position_ids)
        normed = self.first_norm(residual)
        for layer, (attention, feed_forward) in enumerate(self.layers):
            if self.kept is not None:
                self.kept.keep_input(layer, residual)
            attended = attention.module(
                hidden_states=normed,
                position_embeddings=rotary,
                attention_mask=None,
                position_ids=position_ids,
                past_key_values=None,
                use_cache=False,
                **attention.options,
            )
            if isinstance(attended, tuple):
                attended = attended[0]
            residual, normed = attention.add_and_norm(attended, residual, **attention.options)
            output = feed_forward.module(normed, **feed_forward.options)
            if isinstance(output, tuple):  # a mixture with its router's logits
                output = output[0].view(residual.shape)
            residual, normed = feed_forward.add_and_norm(output, residual, **feed_forward.options)
        if self.kept is not None:
            self.kept.keep_output(normed[0])
        return normed[0]

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """hidden: [t, D]; rows: [n]; returns [n, V/W] as `ShiftModel.forward`."""
        if len(rows) < len(hidden):  # ascending and distinct: skip the selection if it is all rows
            hidden = hidden.index_select(0, rows)
        logits: torch.Tensor = self.head(hidden[None])[0]
        return logits

    def _embedded(self, input_ids: torch.Tensor) -> torch.Tensor:
        if type(self.embedding) is nn.Embedding:  # other classes may scale the embedding
            return self._elementwise.embed(input_ids, self.embedding.weight)
        embedded: torch.Tensor = self.embedding(input_ids)
        return embedded


def _part(layer: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The part of a layer that has one of `names`."""
    children = children_with_weights(layer)
    return next(children[name] for name in names if name in children)
