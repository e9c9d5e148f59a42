"""Adapts attention layers: splits projections by heads, and refuses what no rule covers."""

from __future__ import annotations

from typing import Any, Protocol, cast

from torch import nn

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.injection.heads import LocalHeadCounts, PerHeadParameter, attention_heads
from ulysses_infer.model.injection.rules import (
    ATTENTION_INPUTS,
    ATTENTION_OUTPUTS,
    ATTENTION_RULES,
    KEY_NORMS,
    LATENT_NAMES,
    QUERY_NORMS,
    AttentionHeads,
)
from ulysses_infer.model.layers.head_plan import HeadPlan
from ulysses_infer.model.layers.linear import cut_features, is_linear
from ulysses_infer.model.layers.norm import PerHeadNorm, ShardedRMSNorm, is_rms_norm
from ulysses_infer.model.quantization.layers import shift_linear
from ulysses_infer.parallel.layout import Layout, Place, check_heads
from ulysses_infer.parallel.sharding import Part

ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


class ModeAware(Protocol):
    """Anything that reads its weights differently in each mode."""

    def bind(self, place: Place) -> None:
        """Read them as `place` needs from now on."""
        ...


class AttentionInjector:
    """Injects every attention layer of a model. `layers` are the modules found, `bound` what follows the mode."""

    def __init__(self, model: nn.Module, config: Any, local_config: Any, layout: Layout, base: Place) -> None:
        self.config, self.local_config = config, local_config
        self.layout, self.base = layout, base
        self.mode_aware_layers: list[ModeAware] = []
        self.layers: list[nn.Module] = []
        self._check_layer_types()
        for name, module in list(model.named_modules()):
            if hasattr(module, "layer_idx") and _has_linear(module, ATTENTION_INPUTS):
                self._inject(name, module)
                self.layers.append(module)
        if not self.layers:
            raise UnsupportedModelError(
                f"no attention layer of model type {config.model_type!r} has a projection this engine can cut "
                f"(known: {', '.join(ATTENTION_INPUTS)})"
            )

    def _check_layer_types(self) -> None:
        foreign = sorted(set(getattr(self.config, "layer_types", None) or ()) - ATTENTION_KINDS)
        if foreign:
            raise UnsupportedModelError(
                f"model type {self.config.model_type!r} has {', '.join(foreign)} layers; this engine knows "
                f"{', '.join(sorted(ATTENTION_KINDS))}"
            )

    def _inject(self, name: str, module: nn.Module) -> None:
        self._check(name, module)
        heads = attention_heads(module, self.config)
        check_heads(self.layout, heads.num_attention_heads, heads.num_key_value_heads)
        plan = HeadPlan(heads.num_attention_heads, heads.num_key_value_heads)
        untyped = cast(Any, module)
        untyped.head_plan = plan
        untyped.attention_chunk_size = _chunk_size(self.config, untyped.layer_idx)
        for child, linear in list(module.named_children()):
            if child in ATTENTION_RULES and is_linear(linear):
                cut, rule = ATTENTION_RULES[child]
                sharding = rule(cut_features(linear, cut), heads)
                self._replace(module, child, shift_linear(linear, cut, sharding, self.base))
        self._inject_norms(module, heads)
        self._inject_vectors(name, module, heads)
        untyped.config = self.local_config
        self.mode_aware_layers.append(LocalHeadCounts(module, self.local_config, plan))

    def _inject_norms(self, module: nn.Module, heads: AttentionHeads) -> None:
        """Query and key norms over more than one head follow the mode; norms over a single head need nothing."""
        for child, count, shared in (
            *((name, heads.num_attention_heads, False) for name in QUERY_NORMS),
            *((name, heads.num_key_value_heads, True) for name in KEY_NORMS),
        ):
            norm = dict(module.named_children()).get(child)
            size = 0 if norm is None else sum(parameter.numel() for parameter in norm.parameters())
            if norm is None or size <= self._head_width(module):
                continue
            weight = getattr(norm, "weight", None)
            if weight is not None and weight.dim() == 2:
                self._replace(module, child, PerHeadNorm(norm, Part(count, shared=shared)))
            elif weight is not None and is_rms_norm(norm):
                self._replace(module, child, ShardedRMSNorm(norm, Part(count, weight.numel() // count, shared)))
            elif weight is None or weight.numel() > self._head_width(module):
                raise UnsupportedModelError(
                    f"{child} of {type(module).__name__} is a norm across heads of a kind this engine cannot shard"
                )

    def _inject_vectors(self, name: str, module: nn.Module, heads: AttentionHeads) -> None:
        """Parameters of the module itself. Sinks reach our attention function whole, which takes its heads' own."""
        for leaf, parameter in module.named_parameters(recurse=False):
            if "sink" in leaf:
                continue
            if parameter.shape[0] != heads.num_attention_heads:
                raise UnsupportedModelError(
                    f"{name}.{leaf} {list(parameter.shape)} is a weight inside attention that no sharding rule covers"
                )
            self.mode_aware_layers.append(PerHeadParameter(module, leaf, heads.num_attention_heads))

    def _head_width(self, module: nn.Module) -> int:
        width = getattr(module, "head_dim", None) or getattr(self.config, "head_dim", None)
        return int(width or self.config.hidden_size // self.config.num_attention_heads)

    def _check(self, name: str, module: nn.Module) -> None:
        """Refuse an attention module that is not causal, or has weights that no rule covers."""
        kind = type(module).__name__
        if not _has_linear(module, ATTENTION_OUTPUTS):
            raise UnsupportedModelError(
                f"{name} ({kind}) has no output projection this engine knows ({', '.join(ATTENTION_OUTPUTS)})"
            )
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(f"{name} ({kind}) is not causal: its tokens see later ones")
        known = {*ATTENTION_RULES, *QUERY_NORMS, *KEY_NORMS, *LATENT_NAMES}
        for child, part in module.named_children():
            if child not in known and any(True for _ in part.parameters()):
                raise UnsupportedModelError(
                    f"{name}.{child} ({type(part).__name__}) has weights inside attention that no sharding rule covers"
                )

    def _replace(self, parent: nn.Module, child: str, replacement: nn.Module) -> None:
        setattr(parent, child, replacement)
        self.mode_aware_layers.append(cast(ModeAware, replacement))


def _has_linear(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(name in names and is_linear(child) for name, child in module.named_children())


def _chunk_size(config: Any, layer_index: int) -> int | None:
    """llama4 attends within chunks on some layers; its modeling code says so only through the mask."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types and layer_types[layer_index] == "chunked_attention":
        return int(config.attention_chunk_size)
    return None
