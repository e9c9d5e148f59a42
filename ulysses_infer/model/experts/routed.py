"""Tokens with the experts that a router chose for them, and the message that carries them to other ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ulysses_infer.arithmetic import round_up

WORD, ROW = 4, 16
"""Bytes of a weight and of an expert's number, and what the bytes of a packed row are a multiple of."""


@dataclass(frozen=True)
class Packing:
    """Rows of a token's hidden state, its weights (float32), and its experts (int32), in the dtype of the first."""

    hidden_size: int
    top_k: int
    dtype: torch.dtype

    def empty(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Memory for packed rows, [t, C]."""
        row_bytes = round_up(WORD * (self._first_word + 2 * self.top_k), ROW)
        return torch.empty(num_tokens, row_bytes // self.dtype.itemsize, dtype=self.dtype, device=device)

    def views(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states [t, H], weights [t, K] float32 and experts [t, K] int32, all in the memory of `packed`."""
        first, end = self._first_word, self._first_word + self.top_k
        weights, experts = packed.view(torch.float32)[:, first:end], packed.view(torch.int32)[:, end : end + self.top_k]
        return packed[:, : self.hidden_size], weights, experts

    @property
    def _first_word(self) -> int:
        return -(-self.hidden_size * self.dtype.itemsize // WORD)


class Routed(NamedTuple):
    """Tokens with the experts that the router chose for them."""

    hidden: torch.Tensor
    """[t, H]"""
    experts: torch.Tensor
    """[t, K] integers, of any row stride."""
    weights: torch.Tensor | None
    """[t, K], of any row stride; None: 1, with K = 1 (llama4, which scales the inputs)."""
    weights_dtype: torch.dtype | None = None
    """The dtype in which the router computed them, if not their own."""
    packed: torch.Tensor | None = None
    """The memory of all three, if a router has written them so."""

    @property
    def packing(self) -> Packing:
        """Of these tokens."""
        return Packing(self.hidden.shape[1], self.experts.shape[1], self.hidden.dtype)

    def pack(self) -> torch.Tensor:
        """[t, C]: everything that travels with a token, in one message."""
        if self.packed is not None:
            return self.packed
        packed = self.packing.empty(len(self.hidden), self.hidden.device)
        hidden, weights, experts = self.packing.views(packed)
        hidden.copy_(self.hidden)
        experts.copy_(self.experts)
        if self.weights is not None:
            weights.copy_(self.weights)
        return packed

    def unpack(self, packed: torch.Tensor) -> Routed:
        """Inverse of `pack`, for other tokens of the same kind. Views."""
        hidden, weights, experts = self.packing.views(packed)
        if self.weights is None:
            return Routed(hidden, experts, None)
        return Routed(hidden, experts, weights, self.weights_dtype or self.weights.dtype)

    @property
    def torch_weights(self) -> torch.Tensor:
        """[t, K], in the dtype in which the router computed them."""
        if self.weights is None:
            return self.hidden.new_ones(self.experts.shape)
        return self.weights.to(self.weights_dtype or self.weights.dtype)
