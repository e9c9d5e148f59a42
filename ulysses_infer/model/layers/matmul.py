"""`linear`: the matrix product of linear layers, by torch or by the native CPU kernels."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ulysses_infer.model.context import step_context_or_none


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """inputs: [..., in]; weight: [out, in], a view with any row stride; bias: [out]; returns [..., out].

    Computed by the kernel of the step context; by torch outside a step.
    """
    step = step_context_or_none()
    if step is None or step.matmul is None:
        return F.linear(inputs, weight, bias)
    return step.matmul(inputs, weight, bias)
