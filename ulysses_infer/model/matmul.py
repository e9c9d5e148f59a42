"""The matrix product of linear layers."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """inputs: [..., in]; weight: [out, in], a view with any row stride; bias: [out]; returns [..., out]."""
    return F.linear(inputs, weight, bias)
