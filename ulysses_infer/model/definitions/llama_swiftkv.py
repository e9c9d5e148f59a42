"""SwiftKV (Qiao et al. 2024, arXiv 2410.03960): keys and values of later layers come from an earlier layer's output.

Later layers then run only on the tokens whose logits are needed. Names of weights and of the config's fields are those
of the published checkpoints (Snowflake/Llama-3.1-SwiftKV-8B-Instruct and others).
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaForCausalLM,
    LlamaModel,
    LlamaRMSNorm,
    rotate_half,
)

from ulysses_infer.attention.backend import AttentionOptions
from ulysses_infer.model.adapters.base import AdaptedAttention
from ulysses_infer.model.injection.rules import ATTENTION_RULES
from ulysses_infer.model.layers.attention import attend_cached_ahead, cache_ahead
from ulysses_infer.model.layers.narrowing import narrowed

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosine and sine of positions, each [1, t, d]."""


@strict
class LlamaSwiftKVConfig(LlamaConfig):
    """Llama's config with the fields of SwiftKV."""

    model_type = "llama_swiftkv"

    num_key_value_layers: int | None = None
    """Layers that make keys and values of their own inputs, the first ones; None: all."""
    key_value_group_size: int = 1
    """Layers after those that share the keys and values of the first of them."""
    kv_sharing_map: dict[str, int] | None = None
    """Another way to share keys and values, which is not supported."""

    def validate_architecture(self) -> None:
        """Part of the validation of transformers' configs. Raises `ValueError`."""
        super().validate_architecture()
        own, layers, group = self.num_own_layers, self.num_hidden_layers, self.key_value_group_size
        if self.kv_sharing_map:
            raise ValueError("kv_sharing_map is not supported; only num_key_value_layers and key_value_group_size are")
        if not 1 <= own <= layers:
            raise ValueError(
                f"num_key_value_layers = {own} must be at least 1 and at most num_hidden_layers = {layers}"
            )
        if group < 1 or (layers - own) % group:
            raise ValueError(
                f"key_value_group_size = {group} must divide the {layers - own} layers after the first {own}"
            )

    @property
    def num_own_layers(self) -> int:
        """`num_key_value_layers`, without None."""
        return self.num_hidden_layers if self.num_key_value_layers is None else self.num_key_value_layers

    @property
    def key_value_sources(self) -> dict[int, int]:
        """For each later layer the one whose keys and values it reads, which may be itself."""
        own, group = self.num_own_layers, self.key_value_group_size
        return {layer: layer - (layer - own) % group for layer in range(own, self.num_hidden_layers)}


class SwiftKVAttention(AdaptedAttention):
    """Attention of a later layer: its own queries, keys and values that are cached before it runs."""

    attention_rules = MappingProxyType(
        {
            "q_proj_swiftkv": ATTENTION_RULES["q_proj"],
            "k_proj_swiftkv": ATTENTION_RULES["k_proj"],
            "v_proj_swiftkv": ATTENTION_RULES["v_proj"],
        }
    )

    def __init__(self, config: Any, layer_idx: int) -> None:
        nn.Module.__init__(self)
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        query_width, width = (
            count * self.head_dim for count in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj_swiftkv = nn.Linear(config.hidden_size, query_width, bias=config.attention_bias)
        self.kv_source_layer = config.key_value_sources[layer_idx]
        if self.makes_keys:
            self.k_proj_swiftkv = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
            self.v_proj_swiftkv = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_width, config.hidden_size, bias=config.attention_bias)

    @property
    def makes_keys(self) -> bool:
        """Whether keys and values are its own, not those of another layer of its group."""
        return self.kv_source_layer == self.layer_idx

    def cache_keys(self, shared: torch.Tensor, rotary: Rotary) -> None:
        """Cache keys and values of all tokens. shared: [1, t, D], the normalised output of the last earlier layer."""
        key, value = self.heads(self.k_proj_swiftkv(shared)), self.heads(self.v_proj_swiftkv(shared))
        key = _rotated(key, rotary)
        cache_ahead(self.layer_idx, self.head_plan, key[0].transpose(0, 1), value[0].transpose(0, 1))

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Rotary, **_: Any) -> tuple[torch.Tensor, None]:
        """hidden_states: [1, t, D]; returns ([1, t, D], None)."""
        query = _rotated(self.heads(self.q_proj_swiftkv(hidden_states)), position_embeddings)
        options = AttentionOptions(scaling=self.head_dim**-0.5)
        attended = attend_cached_ahead(self.layer_idx, self.head_plan, query[0].transpose(0, 1), options)
        return self.o_proj(attended.flatten(1)[None]), None


class LlamaSwiftKVModel(LlamaModel):
    """Llama's layers, of which the later ones attend to keys and values that are made ahead of them."""

    config_class = LlamaSwiftKVConfig

    def __init__(self, config: LlamaSwiftKVConfig) -> None:
        super().__init__(config)
        for layer in config.key_value_sources:
            self.layers[layer].self_attn = SwiftKVAttention(config, layer)
        self.norm_swiftkv = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The layers that all tokens take. input_ids, position_ids: [1, t]; returns their output, [1, t, D]."""
        hidden = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(hidden, position_ids)
        hidden = _run(self.layers[: self.config.num_own_layers], hidden, rotary)
        shared = self.norm_swiftkv(hidden)
        for layer in self._later:
            attention: Any = layer.self_attn
            if attention.makes_keys:
                attention.cache_keys(shared, rotary)
        return hidden

    def later(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The other layers. hidden: [1, n, D], rows of `forward`; position_ids: [1, n]; returns [1, n, D]."""
        return self.norm(_run(self._later, hidden, self.rotary_emb(hidden, position_ids)))

    @property
    def _later(self) -> nn.ModuleList:
        return self.layers[self.config.num_own_layers :]


class LlamaSwiftKVForCausalLM(LlamaForCausalLM):
    """SwiftKV's Llama, which runs in steps of the engine only: it has no attention without its cache."""

    config_class = LlamaSwiftKVConfig

    skips_tokens = True
    """Whether later layers run on the tokens that need logits only."""

    def __init__(self, config: LlamaSwiftKVConfig) -> None:
        super().__init__(config)
        self.model = LlamaSwiftKVModel(config)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, logits_to_keep: torch.Tensor, **_: Any
    ) -> CausalLMOutputWithPast:
        """input_ids, position_ids: [1, t]; logits_to_keep: [n], the rows that need logits."""
        hidden = self.model(input_ids, position_ids)
        with narrowed(hidden, position_ids, logits_to_keep) as step:
            if step.has_tokens:
                hidden = self.model.later(step.hidden, step.positions)
            return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, step.rows]))


def _run(layers: Iterable[nn.Module], hidden: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    for layer in layers:
        hidden = layer(hidden, position_embeddings=rotary, attention_mask=None, use_cache=False)
    return hidden


def _rotated(heads: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """heads: [1, h, t, d]; rotary: each [1, t, d]."""
    cosine, sine = (each[:, None] for each in rotary)
    return heads * cosine + rotate_half(heads) * sine
