"""What all modules of draft heads have in common."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ulysses_infer.model.layers.matmul import linear
from ulysses_infer.model.sampling.head import ShardedHead


class InputProjection(nn.Module):
    """A projection of joined inputs to the width of the layer. Every rank has all of it.

    Checkpoints store it dense, also where all other products are quantised.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: [..., in]; returns [..., out]."""
        return linear(inputs, self.weight)


class HeadModule(nn.Module):
    """One decoder layer that predicts the token after next from a token and the hidden state before it.

    It looks like a transformers model to the loader, the injection, the probe and the fusion pass.
    """

    base_model_prefix = "head"
    hands_on_normed = False
    """Whether `finish` hands on the normed state."""

    def __init__(self, config: Any, embedding: nn.Module, converted_like: Any = None) -> None:
        """embedding: of the served model; its weights are not this module's. converted_like: the transformers model
        whose weight conversions apply to the layer's tensors; None: none apply."""
        super().__init__()
        self.config = config
        self._others = embedding, converted_like  # in a tuple, so that they are not registered
        self._keep_in_fp32_modules = getattr(converted_like, "_keep_in_fp32_modules", None)
        self._keep_in_fp32_modules_strict = getattr(converted_like, "_keep_in_fp32_modules_strict", None)

    @property
    def converted_like(self) -> Any:
        """The transformers model whose weight conversions apply to the layer's tensors."""
        return self._others[1]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self._others[0]

    def get_output_embeddings(self) -> nn.Module | None:
        """Its own vocabulary head; None if it has that of the served model."""
        return None

    @property
    def vocabulary_head(self) -> ShardedHead:
        """The vocabulary head, after injection."""
        raise NotImplementedError

    def fuse(self, hidden: torch.Tensor) -> torch.Tensor:
        """What `states` reads of the served model's hidden states. hidden: [t, F]; returns [t, D]."""
        return hidden

    def states(self, input_ids: torch.Tensor, position_ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """The layer's output, before the output norm.

        input_ids: [1, t], the token after that of `hidden` [1, t, D], whose position is in position_ids [1, t];
        returns [1, t, D].
        """
        raise NotImplementedError

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        """The output norm. states: [1, n, D]."""
        raise NotImplementedError

    def finish(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """states: [n, D], of all ranks' rows. Returns the states that the next token is drafted from, [n, D], and the
        logits of this rank's part of the vocabulary, [n, V/W]."""
        normed, head = self.normed(states[None])[0], self.vocabulary_head
        return normed if self.hands_on_normed else states, head.multiply(normed)

    def tokens_of(self, drafted: torch.Tensor) -> torch.Tensor:
        """The tokens of the served model that those of the head's vocabulary are. drafted: [n]."""
        return drafted

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, logits_to_keep: torch.Tensor, use_cache: bool = False
    ) -> Any:
        """Run on the tokens' own embeddings in place of hidden states, as the probe and the fusion pass need it."""
        hidden = self.get_input_embeddings()(input_ids)
        states = self.normed(self.states(input_ids, position_ids, hidden))
        return SimpleNamespace(logits=self.vocabulary_head(states[:, logits_to_keep]))
