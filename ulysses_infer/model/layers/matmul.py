"""The matrix products of linear layers, by torch or by the native CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ulysses_infer.model.context import step_context_or_none
from ulysses_infer.native.matmul import Weights


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """inputs: [..., in]; weight: [out, in], a view with any row stride; bias: [out]; returns [..., out].

    Computed by the kernel of the step context; by torch outside a step.
    """
    step = step_context_or_none()
    if step is None or step.matmul is None:
        return F.linear(inputs, weight, bias)
    return step.matmul(inputs, weight, bias)


def linears(inputs: torch.Tensor, weights: Sequence[Weights]) -> list[torch.Tensor]:
    """`linear` of each of `weights`, which native kernels may compute together."""
    step = step_context_or_none()
    if step is None or step.matmul is None:
        return [F.linear(inputs, weight, bias) for weight, bias in weights]
    return step.matmul.joint(inputs, weights)
