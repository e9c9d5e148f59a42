"""Integer arithmetic that several modules need."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Integers = TypeVar("Integers", int, np.ndarray)


def ceil_div(numerator: Integers, denominator: int) -> Integers:
    """`numerator / denominator` rounded up, elementwise for arrays."""
    return -(-numerator // denominator)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return ceil_div(number, multiple) * multiple
