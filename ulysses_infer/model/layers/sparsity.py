"""Activation sparsity over sharded neurons (gemma3n): the cutoff depends on all of them."""

from __future__ import annotations

from statistics import NormalDist

import torch

from ulysses_infer.model.context import step_context
from ulysses_infer.parallel.layout import Mode, Place
from ulysses_infer.parallel.sharding import Part


class ShardedTopK:
    """Keeps what exceeds the mean of a token's activations by a number of standard deviations, and subtracts that.

    If activations are normally distributed, a share `sparsity` of them becomes zero. Each rank has the mean and the
    squared deviations of its own neurons; the TP group's are merged as in Chan et al., "Algorithms for computing the
    sample variance" (1983), which loses no digits to the cancellation of large sums.
    """

    def __init__(self, sparsity: float, width: int) -> None:
        """width: neurons of the whole layer."""
        self._multiplier = NormalDist().inv_cdf(sparsity)
        self._part = Part(width)
        self._mode, self._own = Mode(1, 1), 0
        self._shares: dict[tuple[Mode, torch.device], torch.Tensor] = {}

    def bind(self, place: Place) -> None:
        """Switch to the neurons of `place`."""
        self._mode, self._own = place.mode, place.weight_index

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: [..., F/tp]; returns the same shape."""
        mean, deviation = self._statistics(inputs.float())
        cutoff = mean.to(inputs.dtype) + deviation.to(inputs.dtype) * self._multiplier
        return torch.relu(inputs - cutoff)

    def _statistics(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation over all neurons, each [..., 1]."""
        variance, mean = torch.var_mean(inputs, dim=-1, correction=0)
        if self._mode.tp == 1:
            return mean[..., None], variance.sqrt()[..., None]
        of_shards = inputs.new_zeros(*mean.shape, 2, self._mode.tp)
        of_shards[..., 0, self._own], of_shards[..., 1, self._own] = mean, variance
        # A sum with zeros is a gather.
        means, variances = step_context().collectives.sum_over_tp(of_shards).unbind(-2)
        shares = self._shares_of(inputs.device)
        mean = (means * shares).sum(-1, keepdim=True)
        whole = ((variances + (means - mean).square()) * shares).sum(-1, keepdim=True)
        return mean, whole.sqrt()

    def _shares_of(self, device: torch.device) -> torch.Tensor:
        """The share of all neurons that each rank of the TP group has, [tp]; made once, not in captured steps."""
        key, count = (self._mode, device), self._mode.tp
        if key not in self._shares:
            sizes = [self._part.span(index, count).size / self._part.units for index in range(count)]
            self._shares[key] = torch.tensor(sizes, dtype=torch.float32, device=device)
        return self._shares[key]
