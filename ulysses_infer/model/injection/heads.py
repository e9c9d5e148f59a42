"""Sets the head counts inside attention modules to the local ones of the current mode."""

from __future__ import annotations

from typing import Any

from torch import nn

from ulysses_infer.model.injection.rules import (
    KEY_VALUE_COUNT_NAMES,
    KEY_VALUE_WIDTH_NAMES,
    QUERY_COUNT_NAMES,
    QUERY_WIDTH_NAMES,
    AttentionHeads,
)
from ulysses_infer.model.layers.head_plan import HeadPlan
from ulysses_infer.model.layers.latent import LatentWidths
from ulysses_infer.model.shape import LayerHeads
from ulysses_infer.parallel.layout import Place


def attention_heads(module: nn.Module, config: Any) -> AttentionHeads:
    """Head counts of an attention layer. Latent attention (MLA) expands a latent to one KV head per query head."""
    query_heads = _first_int(module, QUERY_COUNT_NAMES) or config_of_layer(module, config).num_attention_heads
    key_value_heads = _first_int(module, KEY_VALUE_COUNT_NAMES)
    if hasattr(module, "kv_b_proj") or (hasattr(module, "query_key_value") and key_value_heads is None):
        return AttentionHeads(query_heads, query_heads)
    groups = _first_int(module, ("num_key_value_groups",))  # what the layer has, unlike its config (mimo_v2_flash)
    key_value_heads = key_value_heads or (query_heads // groups if groups else None)
    key_value_heads = key_value_heads or getattr(config, "num_key_value_heads", None)
    return AttentionHeads(int(query_heads), int(key_value_heads or query_heads))


def layer_heads(module: Any, config: Any) -> LayerHeads:
    """The heads of an injected attention layer as the cache needs them: the latent, if it caches that instead."""
    heads, plan = expanded_heads(module, config), module.head_plan
    if plan.latent is not None:
        latent: LatentWidths = plan.latent.widths
        heads = LayerHeads(heads.num_attention_heads, 1, latent.cached, latent.latent)
    return heads._replace(values_in_keys=plan.values_are_keys, source=plan.source, index_width=plan.index_width)


def expanded_heads(module: Any, config: Any) -> LayerHeads:
    """The heads of an injected attention layer as its attention computes them, with latents expanded."""
    plan, width = module.head_plan, head_width(module, config)
    key_value_heads = plan.num_key_value_heads if plan.latent is None else plan.num_attention_heads
    key_width, value_width = getattr(module, "qk_head_dim", None), getattr(module, "v_head_dim", None)
    return LayerHeads(plan.num_attention_heads, key_value_heads, key_width or width, value_width or width)


def source_of_keys(module: Any, config: Any) -> int | None:
    """The layer whose keys and values an attention layer reads, if it makes none (gemma3n, gemma4); None: its own."""
    if isinstance(source := getattr(module, "kv_source_layer", None), int):  # llama_swiftkv
        return source if source != module.layer_idx else None
    if not getattr(module, "is_kv_shared_layer", False):
        return None
    layer = module.layer_idx
    if getattr(config, "kv_source_layers", None) is not None:  # mistral_large4
        modes, kinds = config.kv_sharing_modes, config.no_rope_layers
        return max(index for index in range(layer) if modes[index] == "store" and kinds[index] == kinds[layer])
    modes, kinds = config.kv_sharing_modes, config.layer_types
    return next(index for index in range(layer) if modes[index] == "store" and kinds[index] == kinds[layer])


def config_of_layer(module: Any, config: Any) -> Any:
    """The config with the values of an attention layer, for models whose layers differ (gemma4)."""
    return config.per_layer_config[module.layer_idx] if getattr(config, "is_heterogeneous", False) else config


def head_width(module: Any, config: Any) -> int:
    """The width of a head that the module's own attributes or its config give."""
    width = getattr(module, "head_dim", None) or getattr(config_of_layer(module, config), "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


class LocalHeadCounts:
    """Sets the head counts and widths that an attention module's forward uses in reshapes to the local ones."""

    def __init__(self, module: nn.Module, local_config: Any, plan: HeadPlan) -> None:
        self.module, self.local_config, self.plan = module, local_config, plan
        self.query_names = _names_with_value(module, QUERY_COUNT_NAMES, plan.num_attention_heads)
        self.key_value_names = _names_with_value(module, KEY_VALUE_COUNT_NAMES, plan.num_key_value_heads)
        self.width = getattr(module, "head_dim", None) if hasattr(module, "c_attn") else None

    def bind(self, place: Place) -> None:
        """Set the local head counts of `place` on the module and on its copy of the config."""
        self.plan.bind(place)
        query_heads, key_value_heads = self.plan.local_attention_heads, self.plan.local_key_value_heads
        self.local_config.num_attention_heads = query_heads
        self._set(self.query_names, query_heads)
        self._set(self.key_value_names, key_value_heads)
        if self.width is not None:
            self._set(_existing_names(self.module, QUERY_WIDTH_NAMES), query_heads * self.width)
            self._set(_existing_names(self.module, KEY_VALUE_WIDTH_NAMES), key_value_heads * self.width)

    def _set(self, names: list[str], value: int) -> None:
        for name in names:
            setattr(self.module, name, value)


class PerHeadParameter:
    """A parameter of an attention module with one entry per query head, of which each mode sees its local heads.

    The full parameter stays registered. The module's forward finds the local view under the same name.
    """

    def __init__(self, module: nn.Module, name: str, heads: AttentionHeads) -> None:
        self.module, self.name, self.part = module, name, heads.query_part(heads.num_attention_heads)

    def bind(self, place: Place) -> None:
        """Switch to the entries of `place`'s heads."""
        span = self.part.span(place.weight_index, place.mode.tp)
        whole = dict(self.module.named_parameters(recurse=False))[self.name].detach()
        # An instance attribute takes precedence over a registered parameter.
        vars(self.module)[self.name] = whole[span.start : span.stop]


def _first_int(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next((value for name in names if isinstance(value := getattr(module, name, None), int)), None)


def _names_with_value(module: nn.Module, names: tuple[str, ...], value: int) -> list[str]:
    return [name for name in names if getattr(module, name, None) == value]


def _existing_names(module: nn.Module, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if hasattr(module, name)]
