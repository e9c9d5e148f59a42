"""FP8 quantisation of rows: one scale per row, or one per 128 values.

The same arithmetic as `quantised_tokens` (model/quantization/products.py), bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ulysses_infer.kernels.launch import launch
from ulysses_infer.kernels.scaled_rows import ALIGNED_ROWS, GROUP, ROW, QuantisedRows

FP8_MAX = tl.constexpr(448.0)
SMALLEST_SCALE = tl.constexpr(1e-12)
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


def quantise(x: torch.Tensor, kind: int) -> QuantisedRows:
    """x: [..., K], quantised by row or by group."""
    flat = dense_rows(x)
    rows, width = flat.shape
    found = empty_quantised(x, x.shape, kind)
    if kind == ROW:
        groups = min(tile_groups(width), TILE)
        launch(quantise_rows, (rows,), flat, found.values, found.scales, flat.stride(0), width, GROUPS=groups)
    else:
        groups = min(tile_groups(width), 8)
        grid = (rows, triton.cdiv(width, groups * GROUP))
        strides = (flat.stride(0), found.scales.stride(1))
        launch(quantise_groups, grid, flat, found.values, found.scales, *strides, width, GROUPS=groups)
    return found


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x: [..., K] as [rows, K], with dense rows; a view where possible."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def empty_quantised(like: torch.Tensor, shape: torch.Size, kind: int) -> QuantisedRows:
    """Memory for a quantised tensor of `shape` and of the dtype and device of `like`."""
    rows, width = shape[:-1].numel(), shape[-1]
    if kind == ROW:
        values, scales = (rows, width), like.new_empty(rows, 1, dtype=torch.float32)
    else:
        padded = rows + -rows % ALIGNED_ROWS
        values, scales = (padded, width), like.new_empty(width // GROUP, padded, dtype=torch.float32).t()
    return QuantisedRows(like.new_empty(*values, dtype=torch.float8_e4m3fn), scales, kind, shape, like.dtype)


def tile_groups(width: int) -> int:
    """Groups of 128 that hold `width` values, rounded up to a power of two."""
    groups: int = triton.next_power_of_2(triton.cdiv(width, GROUP))
    return groups
