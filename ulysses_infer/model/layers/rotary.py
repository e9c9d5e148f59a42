"""Rotary embeddings that would depend on the batch are fixed once; the maximum model length."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ulysses_infer.errors import ConfigError

logger = logging.getLogger(__name__)

UNKNOWN_LENGTH = 2048  # where a config declares none


def freeze_rotary(model: nn.Module, max_model_len: int) -> None:
    """Fix rotary frequencies that transformers recomputes from each batch's longest position.

    `dynamic` and `longrope` would make a token depend on its neighbours in a mixed batch; they are computed once for
    the longest sequence the engine takes.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and _depends_on_batch(kinds):
            _compute_frequencies(module, max_model_len, None)
            cast(Any, module).rope_type = "frozen"
        elif isinstance(kinds, dict):
            for layer_type in [key for key, kind in kinds.items() if _depends_on_batch(kind)]:
                _compute_frequencies(module, max_model_len, layer_type)
                kinds[layer_type] = "frozen"


def _depends_on_batch(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


def _compute_frequencies(module: nn.Module, max_model_len: int, layer_type: str | None) -> None:
    last = torch.tensor([[max_model_len - 1]])
    extra = {} if layer_type is None else {"layer_type": layer_type}
    module(torch.zeros(1, 1, 1), last, **extra)


# -- the longest text ----------------------------------------------------------------------------------------------


def choose_max_model_len(config: Any, wanted: int | None, warn: bool = True) -> int:
    """The longest text to serve, in tokens: `wanted`, or what the checkpoint is made for.

    One that is longer than the rotary embedding is made for is warned of (if `warn`), with the way to stretch it.
    Raises `ConfigError` for one that is longer than a table of learned positions.
    """
    longest = max_supported_len(config)
    if wanted is None:
        # Above its max_position_embeddings `dynamic` would be frozen for a length that few texts have.
        is_dynamic = _kind(_parameters(config)) == "dynamic"
        return int((config.max_position_embeddings if is_dynamic else longest) or UNKNOWN_LENGTH)
    if longest is None or wanted <= longest:
        return wanted
    if not hasattr(config, "rope_parameters"):
        raise ConfigError(
            f"model.max_model_len {wanted} is above {longest}, and model type {config.model_type!r} has learned no "
            "position beyond; lower it"
        )
    if warn:
        logger.warning(
            "model.max_model_len %d is above the %d tokens that the checkpoint is made for: texts beyond that may come "
            "out wrong; %s",
            wanted,
            longest,
            _remedy(config, wanted),
        )
    return wanted


def max_supported_len(config: Any) -> int | None:
    """Tokens that the checkpoint is made for, its rotary embedding stretched as its config warn; None if unknown.

    As vLLM derives it: `yarn` multiplies its original_max_position_embeddings by factor, `linear` and `dynamic`
    multiply max_position_embeddings, which for every other kind, and for models with parameters for each type of
    layer, is the stretched length already.
    """
    declared: int | None = getattr(config, "max_position_embeddings", None)
    rope = _parameters(config)
    kind, factor = _kind(rope), rope.get("factor")
    if declared is None or not factor:
        return declared
    if kind == "yarn":
        return round(rope.get("original_max_position_embeddings", declared) * factor)
    stretches = kind in ("linear", "dynamic") and rope is config.rope_parameters
    return round(declared * factor) if stretches else declared


def _parameters(config: Any) -> Mapping[str, Any]:
    """The rotary embedding of the layers that see the whole text; empty for a model without one."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_layers = rope and config.nested_rope_parameter_keys(rope)
    return (rope.get("full_attention") or {}) if by_layers else rope


def _kind(rope: Mapping[str, Any]) -> str:
    kind: str = rope.get("rope_type", "default")
    return kind


def _remedy(config: Any, wanted: int) -> str:
    """What to write in the recipe for texts of `wanted` tokens."""
    rope = _parameters(config)
    if not rope:
        return "lower it"
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = math.ceil(wanted / original)
    if _kind(rope) == "yarn":
        return f"raise the stretch with model.hf_overrides.rope_parameters.factor={factor}.0, or lower it"
    return (
        f"stretch it with model.hf_overrides.rope_parameters={{rope_type: yarn, factor: {factor}.0, "
        f"original_max_position_embeddings: {original}}}, or lower it (docs/long-context.md)"
    )
