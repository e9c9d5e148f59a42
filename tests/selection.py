"""Which cases of a large product run by default; the rest are marked `thorough`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def diagonal(*axes: Sequence[Any]) -> list[Any]:
    """All combinations of `axes`; by default only those run in which the indices add up to a multiple of the first
    axis' length. So every value of every axis occurs, and every pair of values of two axes once per value of a third.
    """
    cases = []
    for indices in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[index] for axis, index in zip(axes, indices, strict=True)]
        marks = [] if sum(indices) % len(axes[0]) == 0 else [pytest.mark.thorough]
        cases.append(pytest.param(*values, marks=marks, id="-".join(map(shown, values))))
    return cases


def part(step: int, *axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """One in about `step` of all combinations of `axes`: those whose indices add up to a multiple of it."""
    listed = [list(enumerate(axis)) for axis in axes]
    found = [zip(*combination, strict=True) for combination in itertools.product(*listed)]
    return [tuple(values) for indices, values in found if sum(indices) % step == 0]


def shown(value: Any) -> str:
    """A value in the id of a test; a pair is a base mode."""
    return f"sp{value[0]}xtp{value[1]}" if isinstance(value, tuple) else str(value)
