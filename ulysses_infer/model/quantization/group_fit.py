"""Scales and zero points of groups of weights, by least squares.

A weight is stored as `scale * (code - zero)`. The codes of a scale and zero point are the nearest ones; the scale and
zero point of codes are those of a linear regression. Alternating both from several ranges lowers the squared error, as
in HQQ (Badri and Shaji, 2023) and in llama.cpp's search for its K-quants.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

STORED = torch.bfloat16  # scales and zero points
STARTS = (1.0, 0.85)
"""Fractions of a group's range to begin with: covering less clips the extremes and rounds all others more finely."""
REGRESSIONS = 2  # from each start
SMALLEST = 1e-30


class Line(NamedTuple):
    """The scales, zero points and squared errors of groups, [n] float32 each."""

    scales: torch.Tensor
    zeros: torch.Tensor
    errors: torch.Tensor


def fit_groups(values: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """values: [size, n] float32, n groups; returns codes from 0 to `most` (uint8), scales and zero points ([n], bf16).

    Every group's result depends on its own values alone.
    """
    low, high = values.amin(0), values.amax(0)
    centre, width = (low + high) / 2, high - low
    best, _ = _try(values, *_covering(low.clamp(max=0), high.clamp(min=0), most), most)
    for part in STARTS:
        found, codes = _try(values, *_covering(centre - width * part / 2, centre + width * part / 2, most), most)
        best = _better(best, found)
        for _ in range(REGRESSIONS):
            found, codes = _try(values, *_regression(values, codes, found), most)
            best = _better(best, found)
    codes = _nearest(values, best.scales, best.zeros, most)
    return codes.to(torch.uint8), best.scales.to(STORED), best.zeros.to(STORED)


def _covering(low: torch.Tensor, high: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and zero points with which the codes cover `low` to `high`."""
    scales = (high - low) / most
    return scales, -low / _divisor(scales)


def _nearest(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, most: int) -> torch.Tensor:
    return (values * (1 / _divisor(scales))).add_(zeros).round_().clamp_(0, most)


def _try(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, most: int) -> tuple[Line, torch.Tensor]:
    """Scales and zero points as they will be stored, with their errors and nearest codes [size, n]."""
    scales, zeros = scales.to(STORED).float(), zeros.to(STORED).float()
    codes = _nearest(values, scales, zeros, most)
    errors = (codes - zeros).mul_(scales).sub_(values).square_().sum(0)
    return Line(scales, zeros, errors), codes


def _regression(values: torch.Tensor, codes: torch.Tensor, own: Line) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales and zero points with the least squared error for `codes`; those of `own` where all codes are equal."""
    mean_code, mean_value = codes.mean(0), values.mean(0)
    offsets = codes - mean_code
    scales = (offsets * values).sum(0) / _divisor(offsets.square_().sum(0))
    usable = scales > 0
    zeros = mean_code - mean_value / torch.where(usable, scales, 1.0)
    return torch.where(usable, scales, own.scales), torch.where(usable, zeros, own.zeros)


def _better(best: Line, found: Line) -> Line:
    """The one with the smaller error, for each group."""
    smaller = found.errors < best.errors
    return Line(*(torch.where(smaller, new, old) for new, old in zip(found, best, strict=True)))


def _divisor(values: torch.Tensor) -> torch.Tensor:
    """`values`, none of them negative, 1 in place of zero and of what has no finite inverse."""
    return torch.where(values < SMALLEST, 1.0, values)
