"""Multimodal models whose text needs more than the removal of their encoders."""

from __future__ import annotations

from typing import Any

from torch import nn

from ulysses_infer.model.adapters.base import replace_all
from ulysses_infer.model.adapters.positions import StepEmbedding


class LocalImageTokens:
    """Stands for Chameleon's vocabulary mapping: the image tokens by their index in this rank's logits."""

    def __init__(self, model: Any, tokens: list[int]) -> None:
        self._model, self._tokens = model, tokens

    @property
    def image_tokens(self) -> list[int]:
        """Those in this rank's part of the vocabulary, counted from its start."""
        own = self._model.lm_head.vocabulary
        return [token - own.start for token in self._tokens if own.start <= token < own.stop]


def adapt_chameleon(model: Any) -> None:
    """Exclude image tokens, as transformers does, from the logits of each rank."""
    model.model.vocabulary_mapping = LocalImageTokens(model, model.model.vocabulary_mapping.image_tokens)


def adapt_kosmos(model: nn.Module) -> None:
    """Kosmos-2.5 counts positions from the batch, and begins behind the padding token's: take those of the step."""
    name = "Kosmos2_5TextSinusoidalPositionalEmbedding"
    replace_all(model, name, lambda source: StepEmbedding(source, source.padding_idx + 1))


def adapt_mllama(model: Any) -> None:
    """Remove the layers of Llama 3.2 Vision that are skipped without an image; the others keep their numbers."""
    for index in model.cross_attention_layers:
        model.layers[index] = nn.Identity()
