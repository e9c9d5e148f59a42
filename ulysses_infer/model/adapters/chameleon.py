"""Chameleon as a text model: it excludes image tokens by their ids, of which a rank's logits have a part."""

from __future__ import annotations

from typing import Any


class LocalImageTokens:
    """Stands for the vocabulary mapping: the image tokens by their index in this rank's logits."""

    def __init__(self, model: Any, tokens: list[int]) -> None:
        self._model, self._tokens = model, tokens

    @property
    def image_tokens(self) -> list[int]:
        """Those in this rank's part of the vocabulary, counted from its start."""
        own = self._model.lm_head.vocabulary
        return [token - own.start for token in self._tokens if own.start <= token < own.stop]


def adapt_chameleon(model: Any) -> None:
    """Replace the mapping."""
    model.model.vocabulary_mapping = LocalImageTokens(model, model.model.vocabulary_mapping.image_tokens)
