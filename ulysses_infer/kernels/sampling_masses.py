"""The weights of tokens as integers, whose sums are exact in any order."""

from __future__ import annotations

import torch

FRACTION = 2**40
"""Weights in [0, 1] are summed as multiples of 1 / FRACTION; int64 holds the sum of 2**22 of them."""


def masses(weights: torch.Tensor) -> torch.Tensor:
    """`weights` float32 in [0, 1] as multiples of 1 / FRACTION, rounded down: int64."""
    return (weights * FRACTION).to(torch.int64)
