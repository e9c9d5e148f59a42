"""Mixture-of-experts layers: the experts function that transformers' models call, and each mode's weight views.

Placement `replicate`: every TP slice holds its part of the width of every expert, as dense layers do, so experts
never move when the mode shifts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ulysses_infer.model.context import step_context
from ulysses_infer.parallel.layout import Place, Span
from ulysses_infer.parallel.sharding import Part, Sharding

EXPERTS_NAME = "ulysses_infer"


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is a transformers experts module: 3-D weights behind the experts interface."""
    return all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated"))


class ExpertPlan:
    """The stored base slice of one experts module and the views of the current mode.

    Weights are kept as transformers has them: up `[E, k * I, H]`, down `[E, H, I]` (`is_transposed`: `[E, H, k * I]`
    and `[E, I, H]`), with k = 2 for gate and up, side by side or interleaved.
    """

    def __init__(self, module: nn.Module, base: Place) -> None:
        self.module, self.base = module, base
        flags: Any = module
        self.up_name = "gate_up_proj" if flags.has_gate else "up_proj"
        down = getattr(module, "down_proj")  # noqa: B009 - modules are untyped
        width = down.shape[1 if flags.is_transposed else 2]
        self.up_sharding = Sharding(_up_parts(width, flags.has_gate, flags.is_concatenated))
        self.down_sharding = Sharding((Part(width),))
        self._up: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._down: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def slices(self, name: str) -> tuple[int, list[Span]] | None:
        """Which part of the full parameter `name` this rank keeps: (dimension, spans), None for all of it."""
        transposed = bool(self.module.is_transposed)
        if name == self.up_name:
            return (2 if transposed else 1), self.up_sharding.base_spans(self.base)
        if name == f"{self.up_name}_bias":
            return 1, self.up_sharding.base_spans(self.base)
        if name == "down_proj":
            return (1 if transposed else 2), self.down_sharding.base_spans(self.base)
        return None

    def bind(self, place: Place) -> None:
        """Read the weights as `place` needs them from now on. Views only."""
        spans = self.up_sharding.local_spans(self.base, place)
        self._up = [
            (self._view(self.up_name, 1, span), self._bias(f"{self.up_name}_bias", span)) for span in spans
        ]
        (span,) = self.down_sharding.local_spans(self.base, place)
        # The down bias is part of the sum over the TP group: one member adds it. (Ranks differ here on purpose.)
        bias = self._bias("down_proj_bias", None) if place.weight_index == 0 else None
        self._down = self._view("down_proj", 2, span), bias

    def _view(self, name: str, dimension: int, span: Span) -> torch.Tensor:
        """[E, in, out] for `grouped_mm`; `dimension` is the cut one of the untransposed weight."""
        weight = getattr(self.module, name).detach()
        if self.module.is_transposed:
            return weight.narrow(3 - dimension, span.start, span.size)
        return weight.narrow(dimension, span.start, span.size).transpose(1, 2)

    def _bias(self, name: str, span: Span | None) -> torch.Tensor | None:
        if not self.module.has_bias:
            return None
        bias = getattr(self.module, name).detach()
        return bias if span is None else bias.narrow(1, span.start, span.size)

    def up(self, tokens: torch.Tensor, offsets: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """tokens: [S, H] sorted by expert; returns [S, local width of up, or gate and up]."""
        pieces = [_grouped_linear(tokens, weight, bias, offsets, experts) for weight, bias in self._up]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def down(self, hidden: torch.Tensor, offsets: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """hidden: [S, local I]; returns [S, H], this rank's part of the sum."""
        assert self._down is not None
        return _grouped_linear(hidden, *self._down, offsets, experts)


def _up_parts(width: int, has_gate: bool, is_concatenated: bool) -> tuple[Part, ...]:
    if not has_gate:
        return (Part(width),)
    return (Part(width), Part(width)) if is_concatenated else (Part(width, width=2),)


def _grouped_linear(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offsets: torch.Tensor, experts: torch.Tensor
) -> torch.Tensor:
    output = F.grouped_mm(tokens, weight, offs=offsets)
    return output if bias is None else output + bias[experts]


def shift_experts(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Experts of one layer in any mode, in the form transformers' `ExpertsInterface` asks for.

    hidden_states: [t, H]; top_k_index, top_k_weights: [t, K]; returns [t, H], summed over the TP group.
    """
    if hidden_states.shape[0] == 0:
        return hidden_states
    plan: ExpertPlan = module.expert_plan
    choices = top_k_index.shape[-1]
    experts, order = torch.sort(top_k_index.reshape(-1))
    counts = torch.bincount(experts, minlength=module.num_experts)
    offsets = counts.cumsum(0).to(torch.int32)
    hidden = plan.up(hidden_states[order // choices], offsets, experts)
    hidden = module._apply_gate(hidden) if module.has_gate else module.act_fn(hidden)
    output = plan.down(hidden, offsets, experts) * top_k_weights.reshape(-1)[order, None]
    unsorted = torch.empty_like(output)
    unsorted[order] = output
    combined = unsorted.view(-1, choices, output.shape[-1]).sum(dim=1).to(hidden_states.dtype)
    return step_context().collectives.sum_over_tp(combined)


def register() -> None:
    """Make `shift_experts` known to transformers under our own name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_NAME, shift_experts)
