"""FP8 quantisation of rows: one scale per row, or one per 128 values.

The same arithmetic as `quantised_tokens` (model/quantization/products.py), bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.launch import launch

GROUP = 128
"""Values per scale of group quantisation."""
NONE, ROW, GROUPED = 0, 1, 2
"""Kinds of quantisation."""
FP8_MAX = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(1e-12)
ALIGNED_ROWS = 4
"""Group-quantised outputs are padded to a multiple of this number of rows, as block-scaled products need."""
TILE = 32
"""Groups per program, or per iteration."""


@triton.jit
def scale_of(largest):
    """The scale of values whose largest magnitude is `largest`."""
    return tl.maximum(tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32)), SMALLEST_SCALE)


@triton.jit
def quantised(values, scale):
    """float32 values divided by their scale, in FP8. `scale` has the shape of `values`."""
    return tl.minimum(tl.maximum(tl.div_rn(values, scale), -FP8_MAX), FP8_MAX).to(tl.float8e4nv)


@triton.jit
def quantise_rows(x, values, scales, x_stride, width, GROUPS: tl.constexpr):
    """One program per row. x: [t, width] with a row stride; values: [t, width] FP8; scales: [t]."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, GROUPS * 128)
    largest = tl.zeros([GROUPS * 128], tl.float32)
    for start in range(0, width, GROUPS * 128):
        column = start + tile
        part = tl.load(x + row * x_stride + column, mask=column < width, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(part))
    scale = scale_of(tl.max(largest, axis=0, keep_dims=True))
    for start in range(0, width, GROUPS * 128):
        column = start + tile
        part = tl.load(x + row * x_stride + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(
            values + row * width + column,
            quantised(part, tl.broadcast_to(scale, [GROUPS * 128])),
            mask=column < width,
        )
    tl.store(scales + row + tl.arange(0, 1), scale)


@triton.jit
def quantise_groups(x, values, scales, x_stride, scale_stride, width, GROUPS: tl.constexpr):
    """One program per row and `GROUPS` groups. scales: [width / 128, padded t], its row stride is `scale_stride`."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    part = tl.load(x + row * x_stride + column, mask=column < width, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(part), axis=1))
    tl.store(
        values + row * width + column,
        quantised(part, tl.broadcast_to(scale[:, None], [GROUPS, 128])),
        mask=column < width,
    )
    tl.store(scales + group * scale_stride + row, scale, mask=group * 128 < width)


def quantise(x: torch.Tensor, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [t, K] with dense rows; returns FP8 values and float32 scales as `empty_quantised` describes."""
    rows, width = x.shape
    values, scales = empty_quantised(x, rows, width, kind)
    if kind == ROW:
        groups = min(tile_groups(width), TILE)
        launch(quantise_rows, (rows,), x, values, scales, x.stride(0), width, GROUPS=groups)
    else:
        groups = min(tile_groups(width), 8)
        grid = (rows, triton.cdiv(width, groups * GROUP))
        launch(quantise_groups, grid, x, values, scales, x.stride(0), scales.stride(1), width, GROUPS=groups)
    return values, scales


def empty_quantised(like: torch.Tensor, rows: int, width: int, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for `rows` quantised rows of `width` values.

    By row: values [rows, width], scales [rows, 1]. By group: values [padded rows, width] and scales [padded rows,
    width / 128], column-major; the padding is not written.
    """
    if kind == ROW:
        return (
            like.new_empty(rows, width, dtype=torch.float8_e4m3fn),
            like.new_empty(rows, 1, dtype=torch.float32),
        )
    padded = rows + -rows % ALIGNED_ROWS
    return (
        like.new_empty(padded, width, dtype=torch.float8_e4m3fn),
        like.new_empty(width // GROUP, padded, dtype=torch.float32).t(),
    )


def tile_groups(width: int) -> int:
    """Groups of 128 that hold `width` values, rounded up to a power of two."""
    groups: int = triton.next_power_of_2(triton.cdiv(width, GROUP))
    return groups
