"""Parts of recurrent layers that need the heads or channels of several ranks: a sum over them, taken in any mode."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ulysses_infer.errors import UnsupportedModelError
from ulysses_infer.model.context import step_context_or_none
from ulysses_infer.model.recurrent.rules import Owner


def sum_over_ranks(partial: torch.Tensor) -> torch.Tensor:
    """The sum of `partial` over the head shards of all ranks."""
    context = step_context_or_none()
    return partial if context is None else context.collectives.sum_over_all(partial)


class SummedLinear:
    """A linear layer over the channels of all ranks: a rank multiplies its own, then the results are summed."""

    def __init__(self, linear: Any) -> None:
        self._linear = linear

    def __call__(self, own: torch.Tensor) -> torch.Tensor:
        """own: [..., own channels]; returns [..., out]."""
        output = sum_over_ranks(F.linear(own, self._linear.weight))
        bias = self._linear.bias
        return output if bias is None else output + bias


class SpreadNorm:
    """An RMS norm of groups of features, each spread over several ranks, with a gate before or after it."""

    def __init__(self, norm: Any, groups: int, owner: Owner) -> None:
        self._norm, self._groups = norm, groups
        self._sharers = owner.world_size // groups
        self._group = owner.shard // self._sharers
        self._gate_last = bool(getattr(norm, "norm_before_gate", False))

    def __call__(self, own: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        """own, gate: [..., own features], all of one group; returns the same shape."""
        wide = own.float()
        if gate is not None and not self._gate_last:
            wide = wide * F.silu(gate.float())
        wide = wide * torch.rsqrt(self._mean_square(wide) + self._norm.variance_epsilon)
        if gate is None or not self._gate_last:
            return self._norm.weight * wide.to(own.dtype)
        return (self._norm.weight * wide * F.silu(gate.float())).to(own.dtype)

    def _mean_square(self, wide: torch.Tensor) -> torch.Tensor:
        """Of the whole group: [..., 1]."""
        squares = wide.new_zeros((*wide.shape[:-1], self._groups))
        squares[..., self._group] = wide.square().sum(dim=-1)
        total = sum_over_ranks(squares)[..., self._group, None]
        return total / (wide.shape[-1] * self._sharers)


def check_spread(norm: nn.Module) -> None:
    """Raise `UnsupportedModelError` unless `SpreadNorm` computes the same as `norm`, which has its whole weight."""
    trial: Any = copy.deepcopy(norm).to_empty(device="cpu").float()
    size = trial.weight.numel()
    for name in ("n_groups", "group_size"):
        if hasattr(trial, name):
            setattr(trial, name, 1 if name == "n_groups" else size)
    with torch.no_grad():
        trial.weight.copy_(torch.linspace(0.5, 2.0, size))
        inputs = torch.linspace(-1.0, 2.0, 2 * size).view(2, 1, size)
        gates = (None,) if not takes_gate(trial) else (inputs.flip(0),)
        ours = SpreadNorm(trial, 1, Owner(0, 1))
        same = all(torch.allclose(trial(inputs, *_given(gate)), ours(inputs, gate), rtol=1e-4) for gate in gates)
    if not same:
        raise UnsupportedModelError(f"{type(norm).__name__} is a norm across heads, of a kind that cannot be sharded")


def takes_gate(norm: nn.Module) -> bool:
    """Whether the norm's forward has a gate."""
    return "gate" in type(norm).forward.__code__.co_varnames


def _given(gate: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    return () if gate is None else (gate,)
