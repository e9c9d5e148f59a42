"""Rotary frequencies that transformers would recompute from each batch, settled once."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn


def freeze_rotary(model: nn.Module, max_model_len: int) -> None:
    """Fix rotary frequencies that transformers recomputes from each batch's longest position.

    `dynamic` and `longrope` would make a token depend on its neighbours in a mixed batch; they are computed once for
    the longest sequence the engine takes.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and _moves(kinds):
            _settle(module, max_model_len, None)
            cast(Any, module).rope_type = "frozen"
        elif isinstance(kinds, dict):
            for layer_type in [key for key, kind in kinds.items() if _moves(kind)]:
                _settle(module, max_model_len, layer_type)
                kinds[layer_type] = "frozen"


def _moves(rope_type: str) -> bool:
    return "dynamic" in rope_type or rope_type == "longrope"


def _settle(module: nn.Module, max_model_len: int, layer_type: str | None) -> None:
    last = torch.tensor([[max_model_len - 1]])
    extra = {} if layer_type is None else {"layer_type": layer_type}
    module(torch.zeros(1, 1, 1), last, **extra)
