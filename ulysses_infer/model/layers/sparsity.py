"""Activation sparsity over sharded neurons (gemma3n): the cutoff depends on all of them."""

from __future__ import annotations

from statistics import NormalDist

import torch

from ulysses_infer.model.context import step_context
from ulysses_infer.parallel.layout import Place
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
        self._sizes = [width]
        self._own = 0

    def bind(self, place: Place) -> None:
        """Switch to the neurons of `place`."""
        count = place.mode.tp
        self._sizes, self._own = [self._part.span(i, count).size for i in range(count)], place.weight_index

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """inputs: [..., F/tp]; returns the same shape."""
        mean, deviation = self._statistics(inputs.float())
        cutoff = mean.to(inputs.dtype) + deviation.to(inputs.dtype) * self._multiplier
        return torch.relu(inputs - cutoff)

    def _statistics(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation over all neurons, each [..., 1]."""
        variance, mean = torch.var_mean(inputs, dim=-1, correction=0)
        if len(self._sizes) == 1:
            return mean[..., None], variance.sqrt()[..., None]
        of_shards = inputs.new_zeros(*mean.shape, 2, len(self._sizes))
        of_shards[..., 0, self._own], of_shards[..., 1, self._own] = mean, variance
        # A sum with zeros is a gather.
        means, variances = step_context().collectives.sum_over_tp(of_shards).unbind(-2)
        shares = torch.tensor(self._sizes, dtype=inputs.dtype, device=inputs.device) / sum(self._sizes)
        mean = (means * shares).sum(-1, keepdim=True)
        whole = ((variances + (means - mean).square()) * shares).sum(-1, keepdim=True)
        return mean, whole.sqrt()
