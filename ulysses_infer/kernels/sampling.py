"""Draws tokens within top-k, top-p and min-p without sorting the vocabulary.

As in FlashInfer's sorting-free kernels (Ye et al. 2025, arXiv 2501.01005; flashinfer.ai/2025/03/10/sampling.html), one
block reads a row several times and compares it with pivots. FlashInfer draws by rejection, so its tokens depend on how
often it tries. Here every limit is found exactly: the bits of weights in [0, 1] are integers below 2**30 in the same
order, and 3 pivots per pass divide the range by 4. So a limit takes 15 passes, on any row. The draw takes one more.

Weights count as integers (`FRACTION`), so sums are exact in any order, and equal to those of any other implementation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ulysses_infer.arithmetic import FRACTION
from ulysses_infer.kernels.launch import launch

COLUMNS = 1024
ROWS = 16  # a tile of ROWS * COLUMNS weights, 64 KiB, is in flight while one block reads a row
NUM_WARPS = 8  # more warps leave too few registers for such a tile
_UNIT = tl.constexpr(float(FRACTION))
_LARGEST = tl.constexpr(2**30 - 1)  # above the bits of 1.0
_PASSES = tl.constexpr(15)  # 4**15 = 2**30


@triton.jit
def _tile_bits(weights, start, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The bits of ROWS * COLUMNS weights from `start`: int32 [ROWS, COLUMNS]; 0 beyond `size`."""
    place = start + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.load(weights + place, mask=place < size, other=0.0).to(tl.int32, bitcast=True)


@triton.jit
def _mass(bits):
    """The weights with these bits in units of 1 / FRACTION, rounded down: int64."""
    return (bits.to(tl.float32, bitcast=True) * _UNIT).to(tl.int64)


@triton.jit
def _threshold(weights, size, low, limit, passes, MASS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The smallest bits from `low` on with less than `limit` above them: mass, or a number of weights."""
    high = low * 0 + _LARGEST
    for _ in range(passes):
        step = (high - low) // 4 + 1
        kind = tl.int64 if MASS else tl.int32
        first = tl.zeros([COLUMNS], kind)
        second = tl.zeros([COLUMNS], kind)
        third = tl.zeros([COLUMNS], kind)
        for start in range(0, size, ROWS * COLUMNS):
            bits = _tile_bits(weights, start, size, ROWS, COLUMNS)
            values = _mass(bits) if MASS else 1
            first += tl.sum(tl.where(bits >= low + step, values, 0), axis=0)
            second += tl.sum(tl.where(bits >= low + 2 * step, values, 0), axis=0)
            third += tl.sum(tl.where(bits >= low + 3 * step, values, 0), axis=0)
        too_low = (tl.sum(first) >= limit).to(tl.int32)
        too_low += (tl.sum(second) >= limit).to(tl.int32)
        too_low += (tl.sum(third) >= limit).to(tl.int32)
        low += too_low * step
        high = tl.minimum(high, low + step - 1)
    return low


@triton.jit
def _measure(weights, size, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The number and mass of the weights above `threshold`, and the number of those equal to it."""
    number = tl.zeros([COLUMNS], tl.int32)
    mass = tl.zeros([COLUMNS], tl.int64)
    equal = tl.zeros([COLUMNS], tl.int32)
    for start in range(0, size, ROWS * COLUMNS):
        bits = _tile_bits(weights, start, size, ROWS, COLUMNS)
        number += tl.sum(tl.where(bits > threshold, 1, 0), axis=0)
        mass += tl.sum(tl.where(bits > threshold, _mass(bits), 0), axis=0)
        equal += tl.sum(tl.where(bits == threshold, 1, 0), axis=0)
    return tl.sum(number), tl.sum(mass), tl.sum(equal)


@triton.jit
def _lookup(weights, size, threshold, num_equal, target, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first id at which the mass of what is kept, in id order, exceeds `target`.

    Kept are the weights above `threshold` and the first `num_equal` of those equal to it.
    """
    value = _mass(threshold)
    token = threshold * 0
    mass = value * 0  # above the threshold, before `token`
    equal = threshold * 0
    reached_mass = mass
    reached_equal = equal
    for start in range(0, size, ROWS * COLUMNS):
        bits = _tile_bits(weights, start, size, ROWS, COLUMNS)
        reached_mass += tl.sum(tl.sum(tl.where(bits > threshold, _mass(bits), 0), axis=0))
        reached_equal += tl.sum(tl.sum(tl.where(bits == threshold, 1, 0), axis=0))
        passed = reached_mass + tl.minimum(reached_equal, num_equal) * value <= target
        token = tl.where(passed, start + ROWS * COLUMNS, token)
        mass = tl.where(passed, reached_mass, mass)
        equal = tl.where(passed, reached_equal, equal)
    begin = token
    for part in range(ROWS):
        place = begin + part * COLUMNS + tl.arange(0, COLUMNS)
        bits = tl.load(weights + place, mask=place < size, other=0.0).to(tl.int32, bitcast=True)
        masses = tl.where(bits > threshold, _mass(bits), 0)
        is_equal = (bits == threshold).to(tl.int32)
        cumulative = mass + tl.cumsum(masses, 0) + tl.minimum(equal + tl.cumsum(is_equal, 0), num_equal) * value
        token += tl.sum((cumulative <= target).to(tl.int32))
        mass += tl.sum(masses)
        equal += tl.sum(is_equal)
    return token


@triton.jit
def draw_kernel(weights, options, tokens, stride, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program per row of `size` weights. `options`, float64: random number, top_k, top_p, min_p."""
    row = tl.program_id(0).to(tl.int64)
    weights += row * stride
    number = tl.load(options + row * 4)
    top_k = tl.load(options + row * 4 + 1).to(tl.int32)
    top_p = tl.load(options + row * 4 + 2)
    lowest = tl.load(options + row * 4 + 3).to(tl.float32).to(tl.int32, bitcast=True)

    passes = tl.where(top_k < size, _PASSES, 0)
    threshold = _threshold(weights, size, lowest, top_k, passes, False, ROWS, COLUMNS)
    above, mass, equal = _measure(weights, size, threshold, ROWS, COLUMNS)
    total = mass + tl.minimum(equal, top_k - above) * _mass(threshold)

    # A token is kept if the mass of those before it is below the limit.
    limit = tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1)
    limit = tl.where(top_p < 1, limit, total + 1)
    passes = tl.where(top_p < 1, _PASSES, 0)
    threshold = _threshold(weights, size, threshold, limit, passes, True, ROWS, COLUMNS)
    above, mass, equal = _measure(weights, size, threshold, ROWS, COLUMNS)
    value = _mass(threshold)
    equal = tl.minimum(equal, top_k - above).to(tl.int64)
    step = tl.maximum(value, 1)
    equal = tl.minimum(equal, (limit - mass + step - 1) // step)

    target = (number * (mass + equal * value).to(tl.float64)).to(tl.int64)
    token = _lookup(weights, size, threshold, equal, target, ROWS, COLUMNS)
    tl.store(tokens + row, token.to(tl.int64))


def draw(weights: torch.Tensor, options: torch.Tensor, rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    """One token per row by inverse transform sampling in id order: [m] int64.

    weights: [m, V] float32 in [0, 1], the largest of a row is 1; options: [m, 4] float64: a random number in [0, 1),
    top_k (V: all), top_p, min_p. Of equal weights at a limit the lowest ids are kept.
    """
    tokens = torch.empty(len(weights), dtype=torch.int64, device=weights.device)
    launch(
        draw_kernel,
        (len(weights),),
        weights,
        options,
        tokens,
        weights.stride(0),
        weights.shape[1],
        ROWS=rows,
        COLUMNS=columns,
        num_warps=NUM_WARPS,
    )
    return tokens
