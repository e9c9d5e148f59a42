"""Integer arithmetic that several modules need."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Integers = TypeVar("Integers", int, np.ndarray)
FRACTION = 2**40
"""Weights in [0, 1] are summed as multiples of 1 / FRACTION, exactly in any order; int64 holds the sum of 2**22."""


def ceil_div(numerator: Integers, denominator: int) -> Integers:
    """`numerator / denominator` rounded up, elementwise for arrays."""
    return -(-numerator // denominator)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return ceil_div(number, multiple) * multiple
