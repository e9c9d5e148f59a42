"""Multimodal checkpoints served as text models, without their image and audio encoders.

Prompts are text, so the encoders and projectors are never used. They are removed before anything
is laid out, and their weights are not read. The rest runs transformers' own forward of the whole
model. The kinds of RoPE with a position each for time, height and width get the same position for all three, as
transformers itself gives them for text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def auto_class(config: Any) -> Any:
    """The auto class of transformers for checkpoints of `config`: the multimodal one if it has encoders."""
    from transformers import MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM

    return AutoModelForMultimodalLM if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING else AutoModelForCausalLM


def thinker_of(config: Any) -> Any:
    """The part of a speech pipeline (Qwen-Omni) that writes text, which is a model of its own; else `config`."""
    return getattr(config, "thinker_config", config)


def drop_multimodal_encoders(model: Any) -> None:
    """Replace every module of a multimodal `model` that text does not use by a placeholder without weights."""
    if model.config.get_text_config(decoder=True) is model.config:
        return
    embedding = model.get_input_embeddings()
    _drop_beside(model, {model.get_decoder(), embedding, model.get_output_embeddings()}, RemovedEncoder(embedding))


class RemovedEncoder(nn.Module):
    """Replaces a removed encoder; has the device of the text model, because some models ask their encoders for it."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._embedding = [embedding]  # in a list, so that it is not registered as a child and loaded twice

    @property
    def device(self) -> torch.device:
        """Where the text's input embedding is."""
        return next(self._embedding[0].parameters()).device


def _drop_beside(module: nn.Module, text: set[Any], dropped: RemovedEncoder) -> None:
    for name, child in module.named_children():
        if child in text or hasattr(child, "vocab_offset"):  # gemma3n embeds all text's ids with those, too
            continue
        if not text.isdisjoint(child.modules()):
            _drop_beside(child, text, dropped)
        elif any(True for _ in child.parameters()):
            setattr(module, name, dropped)
