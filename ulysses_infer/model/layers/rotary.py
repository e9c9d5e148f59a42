"""Freezes rotary embeddings that would depend on the batch, and chooses the maximum model length."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from ulysses_infer.errors import ConfigError

logger = logging.getLogger(__name__)

UNKNOWN_LENGTH = 2048  # used if the config declares no length


def freeze_rotary(model: nn.Module, max_model_len: int) -> None:
    """Fix rotary frequencies that transformers recomputes from each batch's longest position.

    With `dynamic` and `longrope` a token would depend on the other sequences of its batch. Their frequencies are
    computed once, for `max_model_len`.
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
    device = next(module.buffers()).device  # transformers keeps frequencies where the input is
    if device.type == "meta":
        return  # without values
    last = torch.tensor([[max_model_len - 1]], device=device)
    extra = {} if layer_type is None else {"layer_type": layer_type}
    module(torch.zeros(1, 1, 1, device=device), last, **extra)


# -- maximum model length ------------------------------------------------------------------------------------------


def choose_max_model_len(config: Any, wanted: int | None, warn: bool = True) -> int:
    """The maximum model length in tokens: `wanted`, or else what the checkpoint supports.

    warn: log a warning, with the remedy, if `wanted` exceeds what the rotary embedding supports.
    Raises `ConfigError` if `wanted` exceeds the table of learned positions.
    """
    longest = max_supported_len(config)
    if wanted is None:
        # `dynamic` is frozen: a longer default would degrade texts of usual length.
        is_dynamic = _kind(_parameters(config)) == "dynamic"
        return int((config.max_position_embeddings if is_dynamic else longest) or UNKNOWN_LENGTH)
    if longest is None or wanted <= longest:
        return wanted
    if not hasattr(config, "rope_parameters"):
        raise ConfigError(
            f"model.max_model_len {wanted} is above {longest}, the last learned position of model type "
            f"{config.model_type!r}; lower it"
        )
    if warn:
        logger.warning(
            "model.max_model_len %d is above the %d tokens that the checkpoint supports: longer texts may give wrong "
            "results; %s",
            wanted,
            longest,
            _remedy(config, wanted),
        )
    return wanted


def max_supported_len(config: Any) -> int | None:
    """The number of tokens that the checkpoint supports, with RoPE scaling; None if unknown.

    Derived as in vLLM: `yarn` multiplies its original_max_position_embeddings by factor, `linear` and `dynamic`
    multiply max_position_embeddings. For every other kind, and for models with RoPE parameters per layer type,
    max_position_embeddings is the scaled length already.
    """
    declared: int | None = getattr(config, "max_position_embeddings", None)
    rope = _parameters(config)
    kind, factor = _kind(rope), rope.get("factor")
    if declared is None or not factor:
        return declared
    if kind == "yarn":
        return round(rope.get("original_max_position_embeddings", declared) * factor)
    is_scaled = kind in ("linear", "dynamic") and rope is config.rope_parameters
    return round(declared * factor) if is_scaled else declared


def _parameters(config: Any) -> Mapping[str, Any]:
    """The RoPE parameters of the full-attention layers; empty for a model without RoPE."""
    rope: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    by_layers = rope and config.nested_rope_parameter_keys(rope)
    return (rope.get("full_attention") or {}) if by_layers else rope


def _kind(rope: Mapping[str, Any]) -> str:
    kind: str = rope.get("rope_type", "default")
    return kind


def _remedy(config: Any, wanted: int) -> str:
    """The remedy to suggest for a `max_model_len` of `wanted` tokens."""
    rope = _parameters(config)
    if not rope:
        return "lower it"
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    factor = math.ceil(wanted / original)
    if _kind(rope) == "yarn":
        return f"extend it with model.hf_overrides.rope_parameters.factor={factor}.0, or lower it"
    return (
        f"extend it with model.hf_overrides.rope_parameters={{rope_type: yarn, factor: {factor}.0, "
        f"original_max_position_embeddings: {original}}}, or lower it (docs/long-context.md)"
    )
