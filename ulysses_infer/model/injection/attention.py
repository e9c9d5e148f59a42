"""Shards attention layers by heads. Refuses layers that no sharding rule covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from torch import nn

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.adapters.base import AdaptedAttention
from ulysses_infer.model.injection.heads import (
    LocalHeadCounts,
    PerHeadParameter,
    attention_heads,
    config_of_layer,
    head_width,
    source_of_keys,
)
from ulysses_infer.model.injection.rules import (
    ATTENTION_INPUTS,
    ATTENTION_OUTPUTS,
    ATTENTION_RULES,
    INDEX,
    KEY_NORMS,
    LATENT_NAMES,
    PER_HEAD,
    QUERY_NORMS,
    AttentionHeads,
    AttentionRule,
)
from ulysses_infer.model.layers.head_plan import HeadPlan
from ulysses_infer.model.layers.key_index import attach_index
from ulysses_infer.model.layers.linear import cut_features, is_linear
from ulysses_infer.model.layers.norm import PerHeadNorm, ShardedRMSNorm, is_rms_norm
from ulysses_infer.model.layers.temperature import take_temperature
from ulysses_infer.model.quantization.layers import shift_linear
from ulysses_infer.model.recurrent.history import KeepsStates
from ulysses_infer.parallel.layout import Layout, Place

COMPRESSED_KINDS = frozenset({"compressed_sparse_attention", "heavily_compressed_attention"})
"""Attention to a sliding window, and to entries compressed from several tokens each (deepseek_v4)."""
ATTENTION_KINDS = COMPRESSED_KINDS | {
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "indexed_attention",
}
HYBRID_KINDS = frozenset({"linear_attention", "conv", "mamba", "hybrid", "hybrid_sliding", "moe", "mlp"})
"""Further kinds of layers in models with states."""


class ModeAware(Protocol):
    """A layer whose view of its weights depends on the mode."""

    def bind(self, place: Place) -> None:
        """Switch to the weights of `place`."""
        ...


@runtime_checkable
class KeepsViews(Protocol):
    """A mode-aware layer that makes the views of each mode once."""

    def forget_views(self) -> None:
        """Make them again. Called after weights have changed address."""
        ...


class AttentionInjector:
    """Injects all attention layers of a model. `layers`: the attention modules; `mode_aware_layers`: to be bound."""

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        local_config: Any,
        layout: Layout,
        base: Place,
        recurrent: Sequence[nn.Module] = (),
    ) -> None:
        """recurrent: layers that are sharded otherwise."""
        self.config, self.local_config = config, local_config
        self.layout, self.base = layout, base
        self.mode_aware_layers: list[ModeAware] = []
        self.layers: list[nn.Module] = []
        has_states = bool(recurrent) or any(isinstance(module, KeepsStates) for module in model.modules())
        self._check_layer_types(ATTENTION_KINDS | (HYBRID_KINDS if has_states else frozenset()))
        for name, module in list(model.named_modules()):
            if module in recurrent:
                continue
            if hasattr(module, "layer_idx") and _is_attention(module):
                self._inject(name, module)
                self.layers.append(module)
        if not self.layers and not recurrent:
            raise UnsupportedModelError(
                f"no attention layer of model type {config.model_type!r} has a projection that can be sharded "
                f"(known: {', '.join(ATTENTION_INPUTS)})"
            )

    def _check_layer_types(self, known: frozenset[str]) -> None:
        unknown = sorted(set(getattr(self.config, "layer_types", None) or ()) - known)
        if unknown:
            raise UnsupportedModelError(
                f"model type {self.config.model_type!r} has {', '.join(unknown)} layers; supported: "
                f"{', '.join(sorted(known))}"
            )

    def _inject(self, name: str, module: nn.Module) -> None:
        self._check(name, module)
        heads = attention_heads(module, self.config).on(self.layout)
        assert heads.layout is not None
        plan = HeadPlan(heads.layout)
        plan.temperature = take_temperature(module)
        plan.source = source_of_keys(module, self.config)
        if isinstance(module, AdaptedAttention):
            plan.entries, plan.values_are_keys = module.cache_entries, module.values_are_keys
        untyped = cast(Any, module)
        untyped.head_plan = plan
        untyped.attention_chunk_size = _chunk_size(self.config, untyped.layer_idx)
        rules = {**ATTENTION_RULES, **_own_rules(module)}
        for child, linear in list(module.named_children()):
            if child in rules and is_linear(linear):
                cut, rule = rules[child]
                sharding = rule(cut_features(linear, cut), heads)
                self._replace(module, child, shift_linear(linear, cut, sharding, self.base))
        for owner, child, (cut, rule) in getattr(module, "projections_elsewhere", ()):
            linear = getattr(owner, child)
            self._replace(owner, child, shift_linear(linear, cut, rule(cut_features(linear, cut), heads), self.base))
        self._inject_norms(module, heads)
        self._inject_vectors(name, module, heads)
        if getattr(module, INDEX, None) is not None:
            plan.index_width = attach_index(module, INDEX, untyped.layer_idx)
        untyped.config = config_of_layer(module, self.local_config)
        self.mode_aware_layers.append(LocalHeadCounts(module, untyped.config, plan))

    def _inject_norms(self, module: nn.Module, heads: AttentionHeads) -> None:
        """Shard query and key norms over several heads. Norms over a single head need no change."""
        parts = ((QUERY_NORMS, heads.query_part), (KEY_NORMS, heads.key_value_part))
        for child, part in ((name, part) for names, part in parts for name in names):
            norm = dict(module.named_children()).get(child)
            size = 0 if norm is None else sum(parameter.numel() for parameter in norm.parameters())
            if norm is None or size <= head_width(module, self.config):
                continue
            weight = getattr(norm, "weight", None)
            if weight is not None and weight.dim() == 2:
                self._replace(module, child, PerHeadNorm(norm, part(weight.shape[0])))
            elif weight is not None and is_rms_norm(norm):
                self._replace(module, child, ShardedRMSNorm(norm, part(weight.numel())))
            elif weight is None or weight.numel() > head_width(module, self.config):
                raise UnsupportedModelError(
                    f"{child} of {type(module).__name__} is a norm across heads, of a kind that cannot be sharded"
                )

    def _inject_vectors(self, name: str, module: nn.Module, heads: AttentionHeads) -> None:
        """Shard the module's own parameters, except for sinks: the attention function selects those of its heads."""
        replicated = getattr(module, "replicated_parameters", ())
        for leaf, parameter in module.named_parameters(recurse=False):
            if "sink" in leaf or leaf in replicated:
                continue
            if parameter.shape[0] != heads.num_attention_heads:
                raise UnsupportedModelError(
                    f"{name}.{leaf} {list(parameter.shape)} is a weight inside attention that no sharding rule covers"
                )
            self.mode_aware_layers.append(PerHeadParameter(module, leaf, heads))
        for part in (child for child_name, child in module.named_children() if child_name in PER_HEAD):
            leaves = [leaf for leaf, _ in part.named_parameters()]
            self.mode_aware_layers += [PerHeadParameter(part, leaf, heads) for leaf in leaves]

    def _check(self, name: str, module: nn.Module) -> None:
        """Raise `UnsupportedModelError` if the module is not causal or has weights that no rule covers."""
        kind = type(module).__name__
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(f"{name} ({kind}) is not causal")
        if isinstance(module, AdaptedAttention):
            return
        if not _has_linear(module, ATTENTION_OUTPUTS) and not hasattr(module, "projections_elsewhere"):
            raise UnsupportedModelError(
                f"{name} ({kind}) has no known output projection ({', '.join(ATTENTION_OUTPUTS)})"
            )
        known = {*ATTENTION_RULES, *_own_rules(module), *QUERY_NORMS, *KEY_NORMS, *LATENT_NAMES, INDEX, *PER_HEAD}
        for child, part in module.named_children():
            if child not in known and any(True for _ in part.parameters()):
                raise UnsupportedModelError(
                    f"{name}.{child} ({type(part).__name__}) has weights inside attention that no sharding rule covers"
                )

    def _replace(self, parent: nn.Module, child: str, replacement: nn.Module) -> None:
        setattr(parent, child, replacement)
        self.mode_aware_layers.append(cast(ModeAware, replacement))


def _own_rules(module: nn.Module) -> Mapping[str, AttentionRule]:
    """The sharding rules that an adapter has given the module."""
    rules: Mapping[str, AttentionRule] = getattr(module, "attention_rules", {})
    return rules


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "projections_elsewhere") or _has_linear(module, (*ATTENTION_INPUTS, *_own_rules(module)))


def _has_linear(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(name in names and is_linear(child) for name, child in module.named_children())


def _chunk_size(config: Any, layer_index: int) -> int | None:
    """The chunk size of a llama4 layer with chunked attention. Its modeling code shows it only in the mask."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[layer_index] == "chunked_attention":
        return int(config.attention_chunk_size)
    return None
