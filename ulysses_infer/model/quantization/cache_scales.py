"""Scales of an FP8 KV cache, read from the checkpoint."""

from __future__ import annotations

import logging
import math
from typing import Any, cast

from ulysses_infer.cache.paged import CacheScales
from ulysses_infer.errors import CheckpointError
from ulysses_infer.model.injection.inject import Injection
from ulysses_infer.model.layers.head_plan import HeadPlan
from ulysses_infer.model.loading.files import TensorSource

logger = logging.getLogger(__name__)

# below the attention layer, by the names of compressed-tensors, modelopt and older checkpoints
KEY_NAMES = ("k_scale", "k_proj.k_scale", "k_proj.output_scale", "attn.k_scale")
VALUE_NAMES = ("v_scale", "v_proj.v_scale", "v_proj.output_scale", "attn.v_scale")


def apply_cache_scales(injection: Injection, source: TensorSource) -> None:
    """Give every attention layer the scales that `source` has for it; layers without scales are cached unscaled.

    Raises `CheckpointError` for scales that are not one positive number per layer.
    """
    keys, found = set(source.keys()), list[bool]()
    plans: dict[int, HeadPlan] = {}
    for name, module in injection.model.named_modules():
        plan: HeadPlan | None = getattr(module, "head_plan", None)  # of an attention layer, fused or not
        if plan is not None:
            scales = CacheScales(_scale(source, keys, name, KEY_NAMES), _scale(source, keys, name, VALUE_NAMES))
            if plan.latent is not None:  # one number is part of both a key and a value
                scales = CacheScales(scales.key, scales.key)
            plan.cache_scales = None if scales == CacheScales() else scales
            found.append(scales != CacheScales())
            plans[cast(Any, module).layer_idx] = plan
    for plan in plans.values():
        if plan.source is not None:
            plan.cache_scales = plans[plan.source].cache_scales
    logger.info("%d of %d layers have scales for the FP8 cache in the checkpoint", sum(found), len(found))


def _scale(source: TensorSource, keys: set[str], layer: str, names: tuple[str, ...]) -> float:
    key = next((f"{layer}.{name}" for name in names if f"{layer}.{name}" in keys), None)
    if key is None:
        return 1.0
    if math.prod(source.shape(key)) != 1:
        raise CheckpointError(f"{key} has shape {list(source.shape(key))}; an FP8 cache takes one scale a layer")
    scale = float(source.read(key, None).float())
    if not 0 < scale < math.inf:
        raise CheckpointError(f"{key} is {scale}, which cannot scale a cache; set cache.dtype to auto")
    return scale
