"""Both products of a layer's experts in one launch each, and those of a shared expert within them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from ulysses_infer.kernels.experts_weights import StoredExperts

if TYPE_CHECKING:
    from ulysses_infer.native.sorted_rows import SortedRows

MOST_ROWS = 64
"""Of an average expert. With more, torch's products, which are bound by arithmetic, are faster."""


class SharedWeights(NamedTuple):
    """Dense weights of a gated feed-forward block, as the mode reads them."""

    activation: str
    gate: torch.Tensor
    """[shards, n, H]"""
    up: torch.Tensor
    """[shards, n, H]"""
    down: torch.Tensor
    """[H, shards * n]"""


class SharedExpert(Protocol):
    """An expert of every token, beside those that the router chooses."""

    def __call__(self, hidden_states: torch.Tensor, unsummed: bool = False) -> torch.Tensor:
        """hidden_states: [t, H]; returns [t, H]. unsummed: leave the sum over the TP group out."""
        ...

    def weights(self) -> SharedWeights | None:
        """Its weights, if they are dense and without biases."""
        ...


class SharedTokens(NamedTuple):
    """What a shared expert is to compute: this rank's tokens, [t, H]."""

    hidden: torch.Tensor
    expert: SharedExpert

    def compute(self) -> torch.Tensor:
        """This rank's part of the sum over the TP group, [t, H]."""
        return self.expert(self.hidden, unsummed=True)


@dataclass(frozen=True)
class StoredMixture:
    """The matrices of a layer's experts as the mode reads them, and the activation between them."""

    activation: str
    gate: StoredExperts
    up: StoredExperts
    down: StoredExperts

    def products(
        self,
        hidden: torch.Tensor,
        found: SortedRows,
        num_experts: int,
        scatter: bool,
        shared: SharedTokens | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden: [t, H]; returns [rows, H], and what `shared` is to compute.

        scatter: of tokens with one expert each, in their order, zero for experts of other ranks; else by row.
        num_experts: of all ranks.
        """
        from ulysses_infer.kernels.experts import DenseProduct, down_product, gated_product

        weights = None if shared is None else shared.expert.weights()
        beside = weights is not None and shared is not None and weights.activation == self.activation
        first = DenseProduct(shared.hidden, weights.gate, weights.up) if beside and shared and weights else None
        inner, other = gated_product(
            hidden, found.tokens, found.ends, self.gate, self.up, self.activation, num_experts, first
        )
        second = DenseProduct(other, weights.down[None]) if other is not None and weights is not None else None
        index = found.tokens if scatter else None
        output, added = down_product(inner, index, found.offsets, self.down, num_experts, second)
        return output, shared.compute() if added is None and shared is not None else added


def mixture_of(
    activation: str, gate: StoredExperts | None, up: StoredExperts | None, down: StoredExperts | None
) -> StoredMixture | None:
    """A mixture of these matrices, if the kernel can read gate and up together. None: torch has a product for one."""
    from ulysses_infer.kernels.experts import are_alike

    if gate is None or up is None or down is None or not are_alike(gate, up):
        return None
    return StoredMixture(activation, gate, up, down)
