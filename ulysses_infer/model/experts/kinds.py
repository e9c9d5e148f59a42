"""Which modules of transformers are experts, and what they weigh."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is a transformers experts module: 3-D weights behind the experts interface."""
    return all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated"))


def scales_inputs(module: nn.Module) -> bool:
    """Whether `module` is llama4's mixture block, whose experts have no such interface."""
    return type(module).__name__ == "Llama4TextMoe"


class ExpertSizes(NamedTuple):
    """How much of a whole model is experts that can be placed."""

    expert_bytes: int
    other_bytes: int
    num_experts: int
    """0: the model has none."""


def expert_sizes(model: nn.Module) -> ExpertSizes:
    """Of transformers' own module tree, before injection."""
    found: list[Any] = [module for module in model.modules() if is_experts(module)]
    found += [module.experts for module in model.modules() if scales_inputs(module)]
    experts = sum(_num_bytes(module) for module in found)
    num_experts = int(found[0].down_proj.shape[0]) if found else 0
    return ExpertSizes(experts, _num_bytes(model) - experts, num_experts)


def _num_bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
