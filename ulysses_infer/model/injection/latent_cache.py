"""Decides whether a model caches MLA latents or heads. All ranks decide the same, before any weight is read."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch

from ulysses_infer.errors import ConfigError
from ulysses_infer.model.layers.latent import LatentAttention, LatentWidths

logger = logging.getLogger(__name__)
HEADS, TOKENS = 2, 3  # of the test in `has_standard_expansion`
TOLERANCE = 1e-9  # of values of about 1, in float64


def enable_latent_cache(injection: Any, wanted: bool | None) -> bool:
    """Make the attention layers of a new `Injection` cache latents instead of heads. Returns whether they do.

    wanted: `cache.latent`; None enables latents where they take less memory per rank.
    Raises `ConfigError` if `wanted` is true and the model does not support latents.
    """
    layers = injection.attention_layers
    if wanted is False or (wanted is None and not any(map(_expands_latents, layers))):
        return _cache_heads(layers)
    reason = _reason_not_to_cache_latents(layers)
    if reason is not None:
        if wanted:
            raise ConfigError(f"cache.latent is true, but {reason} ({injection.config.model_type}); use null or false")
        logger.info("the cache holds heads: %s", reason)
        return _cache_heads(layers)
    widths = [LatentWidths.of(layer) for layer in layers]
    cached, of_heads = sum(each.cached for each in widths), sum(map(_elements_of_heads, layers, widths))
    if wanted is None and cached >= of_heads:
        logger.info("the cache holds heads: %d elements per token, latents have %d", of_heads, cached)
        return _cache_heads(layers)
    own = injection.layout.place(injection.layout.shift, injection.base.shard)
    for layer, of_layer in zip(layers, widths, strict=True):
        latent = LatentAttention(of_layer, layer.kv_b_proj, own)
        layer.head_plan.use_latent(latent)
        layer.expand_kv = latent.join  # the instance attribute overrides the method
        injection.mode_aware_layers.append(latent)
    logger.info("the cache holds latents: %d elements per token, heads would take %d", cached, of_heads)
    return True


def _cache_heads(layers: list[Any]) -> bool:
    """Layers that share latents expand them on their own, so their heads differ. Returns False."""
    for layer in layers:
        if _expands_latents(layer):
            layer.head_plan.source = None
    return False


def _elements_of_heads(layer: Any, widths: LatentWidths) -> int:
    """Elements per token that a rank would cache of the layer's heads."""
    return int(layer.head_plan.heads.query_slots * (widths.key + widths.rotary + widths.value))


def _expands_latents(layer: Any) -> bool:
    return hasattr(layer, "expand_kv") and hasattr(layer, "kv_b_proj")


def _reason_not_to_cache_latents(layers: list[Any]) -> str | None:
    """Why these layers cannot cache latents; None if they can."""
    if not layers or not all(_expands_latents(layer) for layer in layers):
        return "its attention has no latents"
    if any(layer.kv_b_proj.bias is not None for layer in layers):
        return "its kv_b_proj has a bias"
    try:
        kinds = {(type(layer), LatentWidths.of(layer)) for layer in layers}
    except AttributeError as error:
        return f"its attention has no {error.name}"
    if not all(has_standard_expansion(kind, widths) for kind, widths in kinds):
        return "its expand_kv is not just a product with kv_b_proj"
    return None


def has_standard_expansion(kind: Any, widths: LatentWidths) -> bool:
    """Whether `kind.expand_kv` computes the same keys and values as `LatentWidths.expand`, tested on random inputs."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    weight = random(HEADS * (widths.key + widths.value), widths.latent)
    layer = SimpleNamespace(
        kv_b_proj=lambda latents: latents @ weight.t(),
        kv_lora_rank=widths.latent,
        qk_rope_head_dim=widths.rotary,
        qk_nope_head_dim=widths.key,
        v_head_dim=widths.value,
        qk_head_dim=widths.key + widths.rotary,
    )
    plain, rotated = random(1, 1, TOKENS, widths.latent), random(1, 1, TOKENS, widths.rotary)
    try:
        expected = kind.expand_kv(layer, plain, rotated)
    except (TypeError, AttributeError, LookupError, RuntimeError, ValueError):
        return False
    made = widths.expand(torch.cat((plain, rotated), dim=-1)[0, 0], weight.unflatten(0, (HEADS, -1)))
    found = [ours.transpose(0, 1)[None] for ours in made]
    return all(
        theirs.shape == ours.shape and bool((theirs - ours).abs().max() < TOLERANCE)
        for theirs, ours in zip(expected, found, strict=True)
    )
