"""Multi-token prediction: the module that some checkpoints carry behind their decoder layers (arXiv 2412.19437)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ulysses_infer.model.draft_heads.module import HeadModule, InputProjection
from ulysses_infer.model.draft_heads.names import HeadNames
from ulysses_infer.model.sampling.head import ShardedHead


class MtpModule(HeadModule):
    """The first multi-token-prediction module of a checkpoint; its layer is one of the family's own decoder layers."""

    def __init__(self, config: Any, served: Any, names: HeadNames, head: ShardedHead) -> None:
        """config: see `config_of_module`. served: the transformers model, perhaps still without weights; head: its
        vocabulary head."""
        super().__init__(config, served.get_input_embeddings(), served)
        base = served.get_decoder()
        self.names, self.hands_on_normed, self._shared_head = names, names.hands_on_normed, [head]
        with torch.device("meta"):
            self.layer = type(base.layers[-1])(config, 0)
            norm, width = type(self.layer.input_layernorm), config.hidden_size
            self.token_norm, self.hidden_norm, self.output_norm = (norm(width, config.rms_norm_eps) for _ in range(3))
            self.projection = InputProjection(2 * width, width)
        self.rotary_emb: nn.Module = type(base.rotary_emb)(config)

    @property
    def vocabulary_head(self) -> ShardedHead:
        """The served model's."""
        return self._shared_head[0]

    def states(self, input_ids: torch.Tensor, position_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See `HeadModule.states`."""
        token, before = self.token_norm(self.get_input_embeddings()(input_ids)), self.hidden_norm(hidden)
        parts = (before, token) if self.names.hidden_first else (token, before)
        projected = self.projection(torch.cat(parts, dim=-1))
        output = self.layer(
            projected,
            attention_mask=None,
            position_ids=position_ids,
            past_key_values=None,
            use_cache=False,
            position_embeddings=self.rotary_emb(projected, position_ids),
        )
        states: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        """See `HeadModule.normed`."""
        normed: torch.Tensor = self.output_norm(states)
        return normed


def config_of_module(config: Any) -> Any:
    """The config of a model whose only layer is such a module's: full attention and, in a mixture, experts."""
    own = copy.deepcopy(config)
    for name, value in (
        ("num_hidden_layers", 1),
        ("layer_types", ["full_attention"]),
        ("first_k_dense_replace", 0),
        ("mlp_only_layers", []),
        ("decoder_sparse_step", 1),
        ("mlp_layer_types", ["sparse"]),
    ):
        if getattr(own, name, None) is not None:
            setattr(own, name, value)
    return own
