"""Slopes of ALiBi (Press et al. 2022, arXiv 2108.12409): how fast the scores of each head fall with distance."""

from __future__ import annotations

import math

import torch


def geometric_slopes(num_heads: int) -> torch.Tensor:
    """[num_heads] float32: powers of 2^(-8/n), n the largest power of two of heads; the rest lie between them."""
    whole = 2 ** math.floor(math.log2(num_heads))
    between = _powers(2 * whole)[::2]
    return torch.cat((_powers(whole), between[: num_heads - whole]))


def mpt_slopes(num_heads: int) -> torch.Tensor:
    """[num_heads] float32: of the slopes for the next power of two of heads, every second comes first."""
    slopes = _powers(2 ** math.ceil(math.log2(num_heads)))
    return slopes if len(slopes) == num_heads else torch.cat((slopes[1::2], slopes[::2]))[:num_heads]


def _powers(count: int) -> torch.Tensor:
    return torch.pow(2.0, -8.0 / count * torch.arange(1, count + 1, dtype=torch.float32))
