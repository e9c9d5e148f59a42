"""Draws of random tokens on a CPU (sampling.c)."""

from __future__ import annotations

import functools

import torch

from ulysses_infer.native.function import ELEMENTWISE, NativeFunction, native_function


@functools.cache
def _function() -> NativeFunction | None:
    return native_function("sampling", "draw", "pppii", ELEMENTWISE)


def draws_natively(weights: torch.Tensor) -> bool:
    """Whether `draw` can draw from these weights."""
    return weights.is_cpu and weights.dtype == torch.float32 and _function() is not None


def draw(weights: torch.Tensor, options: torch.Tensor) -> torch.Tensor:
    """One token per row of `weights: [m, V]` float32 in [0, 1], after min_p, top_k and top_p: [m] int64.

    options: [m, 4] float64 of a random number in [0, 1), the most tokens that top_k keeps, top_p and min_p.
    """
    rows, size = weights.shape
    weights, tokens = weights.contiguous(), torch.empty(rows, dtype=torch.int64)
    function = _function()
    assert function is not None
    function(weights.data_ptr(), options.data_ptr(), tokens.data_ptr(), rows, size)
    return tokens
