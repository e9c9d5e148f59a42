"""Norms over all heads of a sharded input: their statistics or weights depend on the mode."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ulysses_infer.model.context import step_context
from ulysses_infer.parallel.layout import Place, Span
from ulysses_infer.parallel.sharding import Part


def is_rms_norm(source: nn.Module) -> bool:
    """Whether `source` computes weight * x / rms(x) and nothing else, found by running a copy of it.

    Norms that subtract the mean, have a bias or add 1 to the weight have similar names.
    """
    trial: Any = copy.deepcopy(source).to_empty(device="cpu").float()
    with torch.no_grad():
        for parameter in trial.parameters():
            parameter.copy_(torch.linspace(0.5, 2.0, parameter.numel()).view_as(parameter))
    x = torch.linspace(-1.0, 2.0, trial.weight.numel())[None]
    expected = trial.weight * x * torch.rsqrt(x.square().mean() + _epsilon(source))
    return torch.allclose(trial(x), expected, rtol=1e-4)


def _epsilon(source: Any) -> float:
    epsilon: float = getattr(source, "variance_epsilon", None) or source.eps
    return epsilon


class ShardedRMSNorm(nn.Module):
    """RMS norm over all heads at once (olmo2, olmoe, minimax): the mean square is summed over the TP group."""

    def __init__(self, source: nn.Module, part: Part) -> None:
        super().__init__()
        self.weight = nn.Parameter(source.weight.detach(), requires_grad=False)  # type: ignore[operator]
        self.eps = _epsilon(source)
        self.part = part
        self._own = Span(0, part.features)

    def bind(self, place: Place) -> None:
        """Switch to the weights of `place`'s heads. A head that several ranks compute counts on one of them."""
        index, count = place.weight_index, place.mode.tp
        span = self.part.span(index, count)
        self._own = self.part.own_span(index, count).relative_to(span)
        self._local_weight = self.weight.detach()[span.start : span.stop]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., heads/tp * d]; returns the same shape."""
        wide = hidden.float()
        own = wide[..., self._own.start : self._own.stop]
        squares = step_context().collectives.sum_over_tp(own.square().sum(dim=-1, keepdim=True))
        normed = wide * torch.rsqrt(squares / self.part.features + self.eps)
        return self._local_weight * normed.to(hidden.dtype)


class PerHeadNorm(nn.Module):
    """A norm with separate weights for every head (cohere), or biases: runs transformers' module on the local heads."""

    def __init__(self, source: Any, part: Part) -> None:
        super().__init__()
        self.weight = nn.Parameter(source.weight.detach(), requires_grad=False)
        bias = getattr(source, "bias", None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.part = part
        self._source = [source]  # not registered as a child: only its forward is used

    def bind(self, place: Place) -> None:
        """Give the forward the rows of `place`'s heads."""
        span = self.part.span(place.weight_index, place.mode.tp)
        for name, whole in self.named_parameters():
            local = whole.detach()[span.start : span.stop]
            setattr(self._source[0], name, nn.Parameter(local, requires_grad=False))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [..., heads/tp, d]; returns the same shape."""
        output: torch.Tensor = self._source[0](hidden)
        return output
