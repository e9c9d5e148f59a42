"""Resolves whether input and output embeddings are tied: config.json says so, the checkpoint decides.

Some multimodal configs omit the setting, and transformers' default then ties embeddings that the checkpoint has twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ulysses_infer.model.loading.checkpoint import KeyNames
from ulysses_infer.model.loading.files import TensorSource

logger = logging.getLogger(__name__)


def resolve_weight_tying(model: Any, open_source: Callable[[], TensorSource]) -> None:
    """Turn off weight tying in the configs of `model` if its checkpoint has two different embeddings."""
    configs = (model.config, model.config.get_text_config(decoder=True))
    if any(getattr(config, "tie_word_embeddings", False) for config in configs) and _differ(model, open_source()):
        logger.warning("config.json ties the output embedding to the input's; the checkpoint has two, which are used")
        for config in configs:
            config.tie_word_embeddings = False


def _embeddings(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _differ(model: Any, source: TensorSource) -> bool:
    names, modules = KeyNames(model), {module: name for name, module in model.named_modules()}
    known = {names.rename(key)[0]: key for key in iter(source.keys())}
    pair = [known.get(f"{modules.get(part)}.weight") for part in _embeddings(model)]
    if None in pair:
        return False
    first, second = (source.read(str(key), None) for key in pair)
    return first.data_ptr() != second.data_ptr() and not torch.equal(first, second)
