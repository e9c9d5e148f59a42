"""Integer arithmetic that several modules need."""

from __future__ import annotations


def ceil_div(numerator: int, denominator: int) -> int:
    """`numerator / denominator` rounded up. Also works elementwise on integer arrays."""
    return -(-numerator // denominator)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return ceil_div(number, multiple) * multiple
